"""Running means of the layers' statistics, and the schedule on which they are renewed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from .. import branches
from .blocks import Array, UnitBlock, mean_scale
from .eigenbasis import EigenBasis

WARM_UP = 16  # batches that the mean blocks take in each
INTERVAL = 32  # batches at least from one eigenbasis to the next
RARELY = 128  # the same where it is but a preconditioner: it may be older


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "scales", "basis"], meta_fields=[])
@dataclass(frozen=True)
class Statistics:
    """Running means of one layer: its mean block, its units' scales, their eigenbasis.

    Attributes:
        mean: (fan-in, fan-in). scales: as ``UnitBlock.unit_scales``. basis: of the mean.
    """

    mean: Array
    scales: Array
    basis: EigenBasis

    @classmethod
    def of(cls, block: UnitBlock) -> Statistics:
        """Statistics of a layer's first batch."""
        mean, scales = block.mean_block(), block.unit_scales()
        return cls(mean, scales, EigenBasis.of(mean, mean_scale(scales)))

    @classmethod
    def empty(cls, block: UnitBlock) -> Statistics:
        """Of no batch: its matrix is zero."""
        mean = jnp.zeros((block.fan_in, block.fan_in), block.features.dtype)
        basis = EigenBasis(jnp.zeros_like(mean[0]), jnp.eye(block.fan_in, dtype=mean.dtype))
        return cls(mean, jnp.zeros(block.coefficients.shape[1:], mean.dtype), basis)


def renewed(
    known: dict[str, Statistics],
    blocks: list[UnitBlock],
    batches: Array,
    decay: float,
    every: int,
    least: int = INTERVAL,
) -> dict[str, Statistics]:
    """Take in a batch; the means and their eigenbases are renewed on a schedule.

    Layers of one schedule are renewed together: every branch costs something. A loop of one
    turn would copy less than a branch, but XLA moves the decompositions out of it.

    Args:
        known: of the blocks, by key. blocks: the batch's.
        batches: how many batches came before. decay: of the means. every: the mean blocks,
            dearer than the scales, take in every so many batches, at that many times the weight.
        least: batches at least from one eigenbasis to the next.
    """
    count = batches + 1

    keep = jnp.minimum(decay, batches.astype(float) / count)
    keep_mean = keep ** jnp.where(count <= WARM_UP, 1, every)

    def mixed(old: Array, new: Array, keep: Array) -> Array:
        keep = keep.astype(old.dtype)
        return keep * old + (1 - keep) * new

    scales = {b.key: mixed(known[b.key].scales, b.unit_scales(), keep) for b in blocks}
    means = branches.cond(
        (count <= WARM_UP) | (count % every == 0),
        lambda: {b.key: mixed(known[b.key].mean, b.mean_block(), keep_mean) for b in blocks},
        {b.key: known[b.key].mean for b in blocks},
    )

    def bases(keys: list[str]) -> dict[str, EigenBasis]:
        return {key: EigenBasis.of(means[key], mean_scale(scales[key])) for key in keys}

    found: dict[str, EigenBasis] = {}
    intervals = {b.key: max(least, b.fan_in * every // 16) for b in blocks}
    for interval in sorted(set(intervals.values())):
        group = {key: known[key].basis for key, own in intervals.items() if own == interval}
        found |= branches.cond(_due(count, interval), partial(bases, list(group)), group)
    return {key: Statistics(means[key], scales[key], found[key]) for key in means}


def _due(count: Array, interval: int) -> Array:
    """After 1, 2, 4, … batches, then every so often: the wider the layer, the rarer."""
    early = (count & (count - 1)) == 0
    return jnp.where(count < interval, early, count % interval == 0)
