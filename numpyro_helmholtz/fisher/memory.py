"""Which batches the Fisher matrix of a step comes from.

The Fisher matrix of a step is estimated from *earlier* minibatches: from the same one, the
solve shrinks the gradient along exactly the samples that it came from. ``"lagged"`` keeps the
previous batch, ``"average"`` a ring of batches (running means for the Kronecker form),
``"same"`` is for comparison, ``"dream"`` takes the model's blocks from dreams.

What is kept is a pytree of fixed shapes (``Kept``); what it is kept by is static (``Memory``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import branches
from ..parameters import strong
from .assemble import Block
from .blocks import UnitBlock, mean_scale
from .eigenbasis import EigenBasis
from .matrix_free import MatrixFreeBlock
from .statistics import INTERVAL, RARELY, Statistics, renewed

Array = Any
FORMS = ("unit", "diagonal", "kronecker")
SAMPLES = ("lagged", "average", "same", "dream")
RING = 8
DECAY = 0.99


@dataclass
class Fisher:
    """The Fisher matrix of a step.

    Attributes:
        blocks: with disjoint parameters. damping: α.
    """

    blocks: list[Block]
    damping: Array | float

    def solve(self, gradient: Mapping[str, Array]) -> dict[str, Array]:
        """``(1+α)(αI + F)⁻¹ g`` by name; parameters without a block keep their gradient."""
        result = dict(gradient)
        for block in self.blocks:
            if not all(name in gradient for name in block.params):
                continue
            g = block.gather(gradient)
            x = block.scatter(block.solve(g, jnp.asarray(self.damping, g.dtype)))
            result |= {name: x[name].astype(gradient[name].dtype) for name in x}
        return result


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["batches", "held", "statistics"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Kept:
    """What a memory keeps, a pytree.

    Attributes:
        batches: how many have come. held: the arrays of each block that are kept, by its key;
            with a leading dimension of batches where there is a ring.
        statistics: of each layer that has any, by its key.
    """

    batches: Array
    held: dict[str, Any]
    statistics: dict[str, Statistics]


@dataclass(frozen=True)
class Memory:
    """The batches that the next step's Fisher matrix comes from.

    Args:
        form: one of ``FORMS``. samples: one of ``SAMPLES``.
        ring: batches kept by "average". decay: of the Kronecker form's running means.
        tolerance: relative error of iterative solves. mean_every: see ``statistics.renewed``.
    """

    form: str
    samples: str
    ring: int = RING
    decay: float = DECAY
    tolerance: float = 1e-2
    mean_every: int = 4

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"fisher={self.form!r}: supported are {', '.join(map(repr, FORMS))}.")
        if self.samples not in SAMPLES:
            raise ValueError(
                f"fisher_samples={self.samples!r}: supported are {', '.join(map(repr, SAMPLES))}."
            )

    # which parts are kept

    def _holds(self, block: Block) -> bool:
        """Whether batches of a block are kept as they are."""
        if self.samples == "same":
            return False
        return self.form != "kronecker" or isinstance(block, MatrixFreeBlock)

    def _rings(self, block: Block) -> bool:
        """Whether several batches of a block are kept."""
        return self.samples == "average" and self._holds(block)

    @property
    def _running(self) -> bool:
        """Whether a layer's statistics are means over batches, not of one batch."""
        return self.form == "unit" or self.samples == "average"

    def _has_statistics(self, block: Block) -> bool:
        if not isinstance(block, UnitBlock) or self.form == "diagonal":
            return False
        if self.form == "kronecker":
            return self.samples != "same"
        rows = block.rows * (self.ring if self._rings(block) else 1)
        return block.needs_basis(rows)

    def start(self, blocks: list[Block]) -> Kept:
        """Before the first batch; only the shapes of the blocks' arrays are read."""
        held = {}
        for block in blocks:
            if self._holds(block):
                arrays = _kept_arrays(block)
                count = (self.ring,) if self._rings(block) else ()
                held[block.key] = jax.tree.map(partial(_zeros, count), arrays)
        statistics = {
            block.key: Statistics.empty(block)
            for block in blocks
            if isinstance(block, UnitBlock) and self._has_statistics(block)
        }
        return Kept(jnp.zeros((), jnp.int32), held, statistics)

    def remember(self, kept: Kept, blocks: list[Block]) -> Kept:
        """Take in a batch; a ring of batches of another shape is begun anew.

        What is kept of blocks that this batch does not have, as of a latent that is observed in
        some batches, stays.
        """
        if self._misfit(kept, blocks):
            kept = with_absent(self.start(blocks), kept)
        held = {}
        for block in blocks:
            if self._holds(block):
                arrays = _kept_arrays(block)
                if self._rings(block):
                    into = partial(_into_ring, kept.batches % self.ring)
                    ring = kept.held.get(block.key) or jax.tree.map(self._full_ring, arrays)
                    arrays = jax.tree.map(into, ring, arrays)
                held[block.key] = arrays
        layers = [b for b in blocks if isinstance(b, UnitBlock) and self._has_statistics(b)]
        known = kept.statistics if self._running else {}
        # Of exact blocks those have statistics that have many rows: a larger batch has more.
        statistics = {b.key: known.get(b.key) or Statistics.of(b) for b in layers}
        if self._running:
            least = RARELY if self.form == "unit" else INTERVAL
            statistics = renewed(
                statistics, layers, kept.batches, self.decay, self.mean_every, least
            )
        return with_absent(Kept(kept.batches + 1, held, statistics), kept)

    def _full_ring(self, x: Array) -> Array:
        """A ring with one batch in all places: of a block that comes later than others."""
        return jnp.broadcast_to(x, (self.ring, *x.shape))

    def _misfit(self, kept: Kept, blocks: list[Block]) -> bool:
        """Whether a ring holds batches of another shape."""
        return any(
            self._rings(block)
            and block.key in kept.held
            and _shapes(jax.tree.map(lambda x: x[0], kept.held[block.key]))
            != _shapes(_kept_arrays(block))
            for block in blocks
        )

    def fisher(
        self,
        kept: Kept,
        current: list[Block],
        damping: Array | float,
        taken_in: Kept,
    ) -> Fisher:
        """The matrix for a step whose own batch gave ``current``.

        Args:
            kept: so far. current: the batch's blocks. damping: α.
            taken_in: what is kept once this batch is in it; the first batch serves itself.
        """
        started = self._started(kept, current)
        blocks = [self._recall(started, block) for block in current]
        if self.form == "kronecker":
            blocks = [_with_statistics(block, kept, taken_in) for block in blocks]
        return Fisher(blocks, damping)

    def _started(self, kept: Kept, current: list[Block]) -> Kept:
        """What is kept; where no batch has come, the current one's arrays as the last one's.

        One branch for all blocks: a choice for each would read both batches in every step.
        """
        own = {b.key: _kept_arrays(b) for b in current if self._holds(b) and not self._rings(b)}
        held = {key: x for key, x in kept.held.items() if _shapes(x) == _shapes(own.get(key))}
        own = {key: own[key] for key in held}
        first = jax.tree.map(_in_common_type, own, held)
        known = jax.tree.map(_in_common_type, held, own)
        found = branches.cond(kept.batches == 0, lambda: first, known)
        return replace(kept, held=kept.held | found)

    def _recall(self, kept: Kept, block: Block) -> Block:
        held = kept.held.get(block.key)
        if held is not None and held.keys() != _kept_arrays(block).keys():
            held = None  # an extra sleep step: the guide alone may enter in a simpler way
        if held is not None and self._rings(block):
            block = self._from_ring(block, kept, held)
        elif held is not None:
            fits = _shapes(held) == _shapes(_kept_arrays(block))
            block = block.with_arrays(held) if fits else _either(block, held, kept.batches == 0)
        if isinstance(block, MatrixFreeBlock):
            return replace(block, tolerance=self.tolerance)
        block = replace(block, solver=self.form, tolerance=self.tolerance)
        known = kept.statistics.get(block.key)
        return block if known is None else replace(block, basis=known.basis)

    def _from_ring(self, block: Block, kept: Kept, held: dict[str, Any]) -> Block:
        """The mean over the batches in a ring; the block's own where it is empty."""
        own, fits = _kept_arrays(block), not self._misfit(kept, [block])
        filled = jnp.clip(kept.batches, 1, self.ring)
        shares = jnp.where(jnp.arange(self.ring) < filled, 1.0, 0.0) / filled
        if isinstance(block, MatrixFreeBlock):
            if not fits:
                return block
            # Empty places hold nothing that a program can run on.
            taken = jnp.arange(self.ring) < kept.batches
            ring = jax.tree.map(partial(_where, taken), held, own)
            return block.with_arrays({**ring, "shares": shares})
        empty = kept.batches == 0
        ring = jax.tree.map(partial(_into_empty_ring, empty), held, own) if fits else held
        u, q = ring["features"], ring["coefficients"]
        q = q * shares.astype(q.dtype).reshape(-1, *(1,) * (q.ndim - 1))
        rows = {
            "features": u.reshape(-1, u.shape[-1]),
            "coefficients": q.reshape(-1, *q.shape[2:]),
        }
        return block.with_arrays(rows) if fits else _either(block, rows, empty)


def with_absent(kept: Kept, other: Kept) -> Kept:
    """What is kept, and what another keeps of blocks that are not in it."""
    here = kept.held.keys() | kept.statistics.keys()
    held = {key: x for key, x in other.held.items() if key not in here}
    statistics = {key: x for key, x in other.statistics.items() if key not in here}
    return Kept(kept.batches, held | kept.held, statistics | kept.statistics)


def _either(block: Block, held: dict[str, Any], first: Array) -> Block:
    """A block on what is held, which has another shape; on its own batch where none has come."""
    if isinstance(block, MatrixFreeBlock):
        return block
    # One below the other, of which one counts.
    own = _kept_arrays(block)
    u = jnp.concatenate([own["features"], held["features"]])
    counts = [own["coefficients"] * first, held["coefficients"] * ~first]
    return block.with_arrays({"features": u, "coefficients": jnp.concatenate(counts)})


def _with_statistics(block: Block, kept: Kept, taken_in: Kept) -> Block:
    """A block with the eigenbasis and the scales that are kept.

    Before the first batch the Fisher matrix is diagonal, by the batch's own mean block: of
    most directions one batch alone says nothing.
    """
    known = kept.statistics.get(block.key)
    if known is None or not isinstance(block, UnitBlock):
        return block
    first, own = kept.batches == 0, taken_in.statistics[block.key]
    # The diagonal as a strided slice: JAX's own gathers it.
    diagonal = own.mean.reshape(-1)[:: len(own.mean) + 1] / mean_scale(own.scales)
    scales = jnp.where(first, own.scales, known.scales)
    basis = EigenBasis(jnp.where(first, diagonal, known.basis.values), known.basis.vectors)
    return replace(block, basis=basis, scales=scales)


def _kept_arrays(block: Block) -> dict[str, Any]:
    """The arrays of a block that make up its batch."""
    names = ("features", "coefficients") if isinstance(block, UnitBlock) else ("recipes",)
    return {name: strong(block.arrays[name]) for name in names}


def _zeros(lead: tuple[int, ...], x: Array) -> Array:
    return lax.full(lead + x.shape, 0, x.dtype)


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)]


def _in_common_type(x: Array, other: Array) -> Array:
    """As it is, or in the type of both where batches differ in it (data as integers once)."""
    return x if x.dtype == other.dtype else x.astype(jnp.promote_types(x.dtype, other.dtype))


def _into_ring(at: Array, ring: Array, x: Array) -> Array:
    return ring.at[at].set(x)


def _where(taken: Array, ring: Array, x: Array) -> Array:
    """A ring with ``x`` in every place that is not taken."""
    return jnp.where(taken.reshape(-1, *(1,) * x.ndim), ring, x)


def _into_empty_ring(empty: Array, ring: Array, x: Array) -> Array:
    """A ring whose first place is ``x`` where no batch has come."""
    return ring.at[0].set(jnp.where(empty, x, ring[0]))


__all__ = ["FORMS", "SAMPLES", "Fisher", "Kept", "Memory", "Statistics"]
