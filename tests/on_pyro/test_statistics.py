"""Running means of layers: every batch has its weight, wide layers keep the largest part."""

import pytest
import torch

from pyro_helmholtz.columns import Columns
from pyro_helmholtz.fisher import eigenbasis
from pyro_helmholtz.fisher.blocks import Component, Part, UnitBlock
from pyro_helmholtz.fisher.statistics import Statistics, compressed

UNITS, SIZE = 3, 30


def block(seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    u[:, 0] += 3
    q = torch.rand(rows, UNITS, generator=generator, dtype=torch.float64)
    columns = Columns(torch.Size((UNITS, SIZE)), None, False, (UNITS, SIZE))
    return UnitBlock(["x"], "affine", [Component(["w"], [columns])], [Part(u, q)])


def mean_after(count, every):
    known = Statistics.of(block(0), every)
    for seed in range(1, count):
        known.update(block(seed), 0.99)
    return known


def test_before_the_window_is_full_all_batches_weigh_the_same():
    known = mean_after(16, 1)
    blocks = [block(seed) for seed in range(16)]
    mean = torch.stack([b.mean_block() for b in blocks]).mean(0)
    torch.testing.assert_close(known.mean, mean)
    torch.testing.assert_close(known.scales, torch.stack([b.unit_scales() for b in blocks]).mean(0))


@pytest.mark.parametrize("every", [1, 4])
def test_later_batches_weigh_as_much_as_the_first(every):
    # with every fourth batch at a quarter of its weight, the first sixteen outweighed the rest
    known = Statistics.of(block(0), every)
    ones = block(0)
    for _ in range(15):
        known.update(ones, 0.99)
    other = block(1)
    for _ in range(48):
        known.update(other, 0.99)
    share = ((known.mean - ones.mean_block()) / (other.mean_block() - ones.mean_block())).median()
    assert abs(float(share) - 48 / 64) < 0.03


def test_low_rank_means_are_exact_while_the_rank_suffices(monkeypatch):
    full = mean_after(7, 1)
    monkeypatch.setattr(eigenbasis, "WIDE", SIZE - 1)
    monkeypatch.setattr(eigenbasis, "RANK", 28)
    low = mean_after(7, 1)
    assert low.mean.shape == (28, SIZE)
    torch.testing.assert_close(low.mean.t() @ low.mean, full.mean)
    g = torch.randn(UNITS, SIZE, dtype=torch.float64)
    one = eigenbasis.EigenBasis.of_factor(low.mean).inverse(low.scales, 0.2, 0.0)(g)
    other = eigenbasis.EigenBasis.of(full.mean).inverse(full.scales, 0.2, 0.0)(g)
    torch.testing.assert_close(one, other)


def test_low_rank_means_leave_out_the_smallest_part(monkeypatch):
    monkeypatch.setattr(eigenbasis, "RANK", 5)
    rows = torch.randn(20, SIZE, dtype=torch.float64) * torch.logspace(0, -2, 20)[:, None]
    values = torch.linalg.eigvalsh(rows @ rows.t())
    kept = compressed(rows)
    assert kept.shape == (5, SIZE)
    error = torch.linalg.matrix_norm(rows.t() @ rows - kept.t() @ kept, 2)
    torch.testing.assert_close(error, values[-6])
