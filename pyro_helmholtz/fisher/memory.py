"""Which batches the Fisher matrix of a step comes from.

The Fisher matrix of a step is estimated from *earlier* minibatches: from the same one, the
solve shrinks the gradient along exactly the samples that it came from. ``"lagged"`` keeps the
previous batch, ``"average"`` a ring of batches (running means for the Kronecker form),
``"same"`` is for comparison, ``"dream"`` takes the model's blocks from dreams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..trace import Programs
from . import eigenbasis
from .blocks import Block, Part, UnitBlock, mean_scale
from .eigenbasis import EigenBasis
from .matrix_free import MatrixFreeBlock
from .statistics import INTERVAL, RARELY, Statistics

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
    damping: float

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(1+α)(αI + F)⁻¹ g`` by name; parameters without a block keep their gradient.

        Parameters that have no gradient here, as the model's in an extra sleep step, count as
        zero in a block that they share, and are left out of the result.

        Raises:
            FloatingPointError: a block that is not positive definite, by site and parameters.
        """
        result = dict(gradient)
        for block in self.blocks:
            missing = [name for name in block.params if name not in gradient]
            if len(missing) == len(block.params):
                continue
            known = gradient
            if missing:
                like = next(gradient[name] for name in block.params if name in gradient)
                shapes = block.leaf_shapes()
                known = {**gradient, **{n: like.new_zeros(shapes[n]) for n in missing}}
            try:
                x = block.scatter(block.solve(block.gather(known), self.damping))
            except FloatingPointError as error:
                what = f"site {block.site!r}, parameters {', '.join(block.params)}"
                raise FloatingPointError(f"{what}: {error}") from error
            if isinstance(block, MatrixFreeBlock):
                block.release()  # the parameters may move before the next solve
            result |= {n: x[n] for n in x if n in gradient} if missing else x
        return result


@dataclass
class Memory:
    """The batches that the next step's Fisher matrix comes from.

    Args:
        form: one of ``FORMS``. samples: one of ``SAMPLES``.
        ring: batches kept by "average". decay: of the Kronecker form's running means.
        tolerance: relative error of iterative solves. mean_every: see ``Statistics``.
    """

    form: str
    samples: str
    ring: int = RING
    decay: float = DECAY
    tolerance: float = 1e-2
    mean_every: int = 4
    batches: deque[list[Block]] = field(default_factory=deque)
    statistics: dict[tuple[str, ...], Statistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"fisher={self.form!r}: supported are {', '.join(map(repr, FORMS))}.")
        if self.samples not in SAMPLES:
            raise ValueError(
                f"fisher_samples={self.samples!r}: supported are {', '.join(map(repr, SAMPLES))}."
            )

    def remember(self, blocks: list[Block]) -> None:
        """Take in a batch.

        Of blocks that it does not have, as of a latent that is observed in some batches, those
        of the batch before stay.
        """
        here = {block.key for block in blocks}
        before = self.batches[-1] if self.batches else []
        self.batches.append(blocks + [block for block in before if block.key not in here])
        while len(self.batches) > self._length():
            self.batches.popleft()
        for block in blocks:
            if isinstance(block, MatrixFreeBlock):
                block.release()
                continue
            if self._needs_basis(block):
                self._update(block)
            if self.form != "kronecker":  # which has its running means
                for part in block.parts:
                    part.join()

    def _length(self) -> int:
        """How many batches are kept; the Kronecker form keeps running means instead."""
        return self.ring if self.samples == "average" and self.form != "kronecker" else 1

    def _needs_basis(self, block: UnitBlock) -> bool:
        if self.form == "unit":
            return block.way(self._length()) == "preconditioned"
        return self.form == "kronecker"

    def _update(self, block: UnitBlock) -> None:
        known = self.statistics.get(block.key)
        fresh = self.form == "kronecker" and self.samples != "average"
        if known is None or fresh or known.fan_in != block.fan_in:
            least = RARELY if self.form == "unit" else INTERVAL
            self.statistics[block.key] = Statistics.of(block, self.mean_every, least)
        else:
            known.update(block, self.decay)

    def fisher(self, current: list[Block], damping: float) -> Fisher:
        """The matrix for a step whose own batch gave ``current``."""
        if self.samples == "same" or not self.batches:
            return Fisher([self._alone(b) for b in current], damping)
        known = [{block.key: block for block in batch} for batch in self.batches]
        kept = [_average([batch.get(b.key) for batch in known], b) for b in current]
        return Fisher([self._finish(b) for b in kept], damping)

    def _alone(self, block: Block) -> Block:
        """A block by its own batch.

        The Kronecker form is diagonal before the first batch: one batch alone says nothing of
        most directions, and the first dreams, which are noise, would take them at full length.
        """
        kronecker = self.form == "kronecker"
        if kronecker and isinstance(block, UnitBlock):
            block = block.solved_by(self.form, self.tolerance)
            if self.samples == "same" or block.fan_in > eigenbasis.WIDE:
                return block
            diagonal = block.root().square().sum(0) / mean_scale(block.unit_scales())
            return replace(block, basis=EigenBasis.of_features(diagonal))
        return self._finish(block)

    def _finish(self, block: Block) -> Block:
        if isinstance(block, MatrixFreeBlock):
            return replace(block, tolerance=self.tolerance, _pieces=[])
        known = self.statistics.get(block.key)
        if known is None:
            return block.solved_by(self.form, self.tolerance)
        scales = known.scales if self.form == "kronecker" else None
        return block.solved_by(self.form, self.tolerance, known.basis, scales)

    def state(self) -> dict[str, Any]:
        """Everything that the next step needs, without graphs."""
        return {
            "batches": list(self.batches),
            "statistics": {key: replace(known) for key, known in self.statistics.items()},
        }

    def load(self, state: dict[str, Any], programs: Programs) -> None:
        """Go on from a saved state; ``programs`` is what its recipes run."""
        self.statistics = {key: replace(known) for key, known in state["statistics"].items()}
        self.batches = deque(
            [
                replace(b, programs=programs, _pieces=[]) if isinstance(b, MatrixFreeBlock) else b
                for b in blocks
            ]
            for blocks in state["batches"]
        )


def _average(kept: list[Block | None], current: Block) -> Block:
    """The mean of the kept batches' blocks; the current one where none was kept."""
    found = [block for block in kept if type(block) is type(current)]
    if not found:
        return current
    share = 1.0 / len(found)
    if len(found) == 1 and isinstance(current, UnitBlock):
        return found[0]
    if isinstance(current, MatrixFreeBlock):
        recipes = [r for b in found if isinstance(b, MatrixFreeBlock) for r in b.recipes]
        return replace(current, recipes=recipes, share=share, _pieces=[])
    parts = [p for b in found if isinstance(b, UnitBlock) for p in b.parts]
    parts = [Part(p.features, p.coefficients * share) for p in parts]
    return replace(current, parts=parts)
