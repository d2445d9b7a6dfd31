"""Running means of layers: every batch has its weight, wide layers keep the largest part."""

import pickle

import pytest
import torch

from pyro_helmholtz.columns import Columns
from pyro_helmholtz.fisher import eigenbasis
from pyro_helmholtz.fisher.blocks import Component, Part, UnitBlock
from pyro_helmholtz.fisher.memory import Memory
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


@pytest.mark.parametrize(("form", "interval"), [("unit", 128), ("kronecker", 32)])
def test_eigenbases_are_found_on_a_schedule(form, interval):
    """More rarely where they only precondition; the Kronecker form solves by them."""
    memory = Memory(form, "lagged" if form == "unit" else "average")
    found, before = [], None
    for batches in range(1, 300):
        memory.remember([block(0, rows=2 * SIZE)])
        (known,) = memory.statistics.values()
        if known.basis is not before:
            found.append(batches)
        before = known.basis
    early = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < interval]
    assert found == early + list(range(interval, 300, interval))


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


def test_pieces_side_by_side_are_one_matrix():
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    q, weight = torch.rand(9, 2, generator=generator), torch.rand(9, generator=generator)
    whole, pieces = Part(u, q), Part([u[:, :3], u[:, 3:]], q)
    assert pieces.shape == whole.shape == (9, 4)
    assert torch.equal(pieces.times(weight), u * weight[:, None])
    assert torch.equal(pieces.by_unit, q.t())
    again = pickle.loads(pickle.dumps(pieces))
    data, before = pieces.features, u.clone()
    u.zero_()  # the user's memory, once the pieces are joined
    assert torch.equal(data, before) and torch.equal(again.features, before)


def test_the_band_is_that_of_the_scale_whatever_came_before():
    generator = torch.Generator().manual_seed(4)
    u = torch.rand(500, 90, generator=generator, dtype=torch.float64)
    g = torch.randn(3, 90, generator=generator, dtype=torch.float64)
    used = eigenbasis.EigenBasis.of(u.t() @ u / 500)
    for top in (0.3, 0.29, 0.31, 1e-4, 0.05, 3.0):
        for damping in (0.1, 0.02):
            scales = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64) * top
            fresh = eigenbasis.EigenBasis(used.values, used.vectors)
            exact = fresh.inverse(scales, damping, 0.0)(g)
            banded = fresh.inverse(scales, damping, 0.2)(g)
            assert torch.equal(used.inverse(scales, damping, 0.2)(g), banded)
            assert (banded - exact).norm() <= 0.2 * exact.norm()
    assert torch.equal(pickle.loads(pickle.dumps(used)).inverse(scales, damping, 0.2)(g), banded)


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_scales_at_the_edge_have_no_band(scale):
    basis = eigenbasis.EigenBasis.of(torch.diag(torch.arange(80.0)))
    g = torch.ones(1, 80)
    for slack in (0.0, 0.2):
        result = basis.inverse(torch.tensor([scale]), 0.1, slack)(g)
        assert torch.allclose(result, 10 * g) if scale == 0 else not result.isfinite().all()
