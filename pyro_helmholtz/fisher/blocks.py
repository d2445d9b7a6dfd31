"""Blocks of the Fisher matrix as operators: ``matvec``, ``diagonal``, ``dense``, ``solve``.

A ``UnitBlock`` holds one layer: all units share the features ``U`` (n, l), each has its own
coefficients ``Q`` (n, units), and ``F_j = Uᵀ diag(Q_j) U``. Memory is n·(l + units). Units
that are vectors (categorical logits, coupled families) have (d, d) coefficients and blocks of
size d·l. ``matrix_free`` has the blocks that have no such form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..columns import Columns
from . import solvers
from .eigenbasis import RANK, WIDE, EigenBasis
from .matrix_free import MatrixFreeBlock
from .solvers import Operator, Solution

Tensors = Mapping[str, Tensor]
KRONECKER_SLACK = 0.35
PRECONDITIONER_SLACK = 0.2
ROWS = 1.5  # up to so many rows for each input the space of the samples is the cheaper one


class Part:
    """One batch's rows: features (n, l), coefficients (n, units) or (n, units, d, d).

    Args:
        features: as one matrix, or several to stand side by side; these are joined where they
            are first asked for, since running means do without in most steps.
        coefficients: one for each row and unit.
    """

    __slots__ = ("_by_unit", "_pieces", "coefficients")

    def __init__(self, features: Tensor | list[Tensor], coefficients: Tensor) -> None:
        self._pieces = [features] if torch.is_tensor(features) else list(features)
        self.coefficients = coefficients
        self._by_unit: Tensor | None = None

    @property
    def by_unit(self) -> Tensor:
        """The coefficients of scalar units, (units, n), kept: they multiply in every product."""
        if self._by_unit is None:
            self._by_unit = self.coefficients.t().contiguous()
        return self._by_unit

    @property
    def features(self) -> Tensor:
        """(n, l), the pieces joined."""
        self.join()
        return self._pieces[0]

    def join(self) -> None:
        """Join the pieces, some of which may be the user's data, before these change."""
        self._pieces = [joined(self._pieces, 1)]

    def times(self, weight: Tensor) -> Tensor:
        """The features, each row times its weight; does not join the pieces."""
        return joined([piece * weight[:, None] for piece in self._pieces], 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the features, (n, l)."""
        return len(self._pieces[0]), sum(piece.shape[1] for piece in self._pieces)

    def without_idle_rows(self, slack: float) -> Part:
        """Leave out rows whose share of every block is below ``slack`` in all, in norm.

        Particles of negligible weight cost as much as the others and change nothing.
        """
        q = self.coefficients
        bound = q.amax(1) if q.ndim == 2 else q.diagonal(dim1=-2, dim2=-1).sum(-1).amax(1)
        share, order = (bound * self.features.square().sum(1)).sort()
        idle = int((share.cumsum(0) <= slack).sum())
        if 4 * idle < share.numel():
            return self
        rows = order[idle:]
        return Part(self.features[rows], q[rows])


@dataclass(slots=True)
class Component:
    """One vector component of a block's units.

    Attributes:
        names, columns: the parameters side by side. units: which rows of them, or None for all.
    """

    names: list[str]
    columns: list[Columns]
    units: Tensor | None = None

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The columns of each parameter, from those of all side by side."""
        return matrix.split_with_sizes([column.shape[1] for column in self.columns], 1)

    def leaves(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters in their own shapes, from the columns of all side by side."""
        values = zip(self.names, self.columns, self.split(matrix), strict=True)
        return {name: column.to_leaf(value) for name, column, value in values}

    def pieces(self, tensors: Tensors) -> list[Tensor]:
        """Parameters' tensors by name, each as (rows, columns)."""
        return [
            column.to_units(tensors[name])
            for name, column in zip(self.names, self.columns, strict=True)
        ]


@dataclass
class UnitBlock:
    """One block per unit over shared features.

    Attributes:
        sites: the sites that the parameters feed. kind: affine, convolution, …, direct.
        components: d of them. parts: rows of one or several batches. exact: the information.
        how: where the information comes from. weighted: whether the rows' weights may be
            unlike, so that some are negligible.
    """

    sites: list[str]
    kind: str
    components: list[Component]
    parts: list[Part]
    exact: bool = True
    how: str = "closed form"
    basis: EigenBasis | None = None
    scales: Tensor | None = None
    solver: str = "unit"
    tolerance: float = 1e-2
    weighted: bool = True

    @property
    def site(self) -> str:
        """Names of the sites that the parameters feed."""
        return ", ".join(self.sites)

    @cached_property
    def params(self) -> list[str]:
        """Names of the parameters."""
        return list(dict.fromkeys(name for c in self.components for name in c.names))

    @cached_property
    def key(self) -> tuple[str, ...]:
        """What identifies the block from batch to batch."""
        return tuple(self.params)

    def leaf_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter by name."""
        return {
            name: columns.leaf_shape
            for component in self.components
            for name, columns in zip(component.names, component.columns, strict=True)
        }

    @property
    def d(self) -> int:
        """Number of components of a unit."""
        return len(self.components)

    @property
    def units(self) -> int:
        """Number of blocks."""
        return int(self.parts[0].coefficients.shape[1])

    @property
    def fan_in(self) -> int:
        """Number of features, the bias included."""
        return self.parts[0].shape[1]

    @property
    def size(self) -> int:
        """Rows of one block."""
        return self.d * self.fan_in

    def gather(self, tensors: Tensors) -> Tensor:
        """Parameters' tensors by name as (units, size)."""
        rows = []
        for component in self.components:
            row = joined(component.pieces(tensors), 1)
            rows.append(row if component.units is None else row[component.units])
        return joined(rows, 1)

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """The inverse of ``gather``."""
        if self.d == 1 and self.components[0].units is None:
            return self.components[0].leaves(x)
        flat: dict[str, Tensor] = {}
        matrices: dict[str, Tensor] = {}
        columns: dict[str, Columns] = {}
        for i, component in enumerate(self.components):
            piece = x if self.d == 1 else x[:, i * self.fan_in : (i + 1) * self.fan_in]
            if component.units is None:
                flat |= component.leaves(piece)
                continue
            values = component.split(piece)
            for name, column, value in zip(component.names, component.columns, values, strict=True):
                if name not in matrices:
                    matrices[name] = torch.zeros(column.shape, dtype=x.dtype, device=x.device)
                    columns[name] = column
                matrices[name][component.units] = value
        return flat | {name: columns[name].to_leaf(m) for name, m in matrices.items()}

    def matvec(self, v: Tensor) -> Tensor:
        """``F v``, (units, size) → (units, size)."""
        return sum(
            (self._product(v, part) for part in self.parts[1:]), self._product(v, self.parts[0])
        )

    def _product(self, v: Tensor, part: Part) -> Tensor:
        u, q = part.features, part.coefficients
        if q.ndim == 2:
            return (v @ u.t()).mul_(part.by_unit) @ u
        inner = v.reshape(self.units, self.d, -1) @ u.t()
        return (torch.einsum("ngij,gjn->gin", q, inner) @ u).reshape(v.shape)

    def diagonal(self) -> Tensor:
        """The diagonal of every block, (units, size)."""
        total = None
        for part in self.parts:
            q = part.coefficients
            q = q[..., None] if q.ndim == 2 else q.diagonal(dim1=-2, dim2=-1)
            value = torch.einsum("ngi,nl->gil", q, part.features.square()).flatten(1)
            total = value if total is None else total + value
        assert total is not None
        return total

    def dense(self) -> Tensor:
        """All blocks, (units, size, size)."""
        total = None
        for part in self.parts:
            u, q = part.features, part.coefficients
            if q.ndim == 2:
                pairs = (u[:, :, None] * u[:, None, :]).reshape(len(u), -1)
                value = (q.t() @ pairs).reshape(self.units, self.size, self.size)
            else:
                value = torch.einsum("ngij,nk,nl->gikjl", q, u, u)
                value = value.reshape(self.units, self.size, self.size)
            total = value if total is None else total + value
        assert total is not None
        return total

    def mean_block(self) -> Tensor:
        """``Σ_n Σ_j tr(Q_nj) u_n u_nᵀ``, (fan-in, fan-in): all units together."""
        rows = self.root()
        return rows.t() @ rows

    def root(self) -> Tensor:
        """Rows whose ``rowsᵀrows`` is the mean block, (n, fan-in)."""
        rows = []
        for part in self.parts:
            q = part.coefficients
            weight = q.sum(1) if q.ndim == 2 else q.diagonal(dim1=-2, dim2=-1).sum((1, 2))
            rows.append(part.times(weight.sqrt()))
        return joined(rows)

    def solved_by(
        self,
        solver: str,
        tolerance: float,
        basis: EigenBasis | None = None,
        scales: Tensor | None = None,
    ) -> UnitBlock:
        """The same block with another solver."""
        block = UnitBlock.__new__(UnitBlock)
        block.__dict__ |= self.__dict__  # as copy.copy does, which takes three times as long
        block.solver, block.tolerance, block.basis, block.scales = solver, tolerance, basis, scales
        return block

    def unit_scales(self) -> Tensor:
        """``s_j = Σ_n Q_nj``, (units,) or (units, d, d)."""
        sums = [part.coefficients.sum(0) for part in self.parts]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def solve(self, g: Tensor, damping: float) -> Tensor:
        """``(1+α)(αI + F)⁻¹ g``, (units, size), by the block's solver."""
        return self.solution(g, damping).x

    def method(self) -> str:
        """The solver's name, for the structure report."""
        if self.solver == "diagonal":
            return "diagonal"
        if self.solver == "kronecker":
            rest = "" if self.basis is None else "; diagonal in the first step"
            if self.fan_in > WIDE:
                rest = f", {RANK} largest eigenvalues"
            return f"Kronecker (shared eigenbasis to {KRONECKER_SLACK:.0%}, unit scales{rest})"
        if self.way() == "dense":
            return "Cholesky"
        space = "in the space of the samples " if self.way() == "samples" else ""
        return f"conjugate gradients {space}to {self.tolerance:g}"

    def way(self, batches: int = 1) -> str:
        """How exact blocks are solved: "dense", "samples" or "preconditioned".

        Args:
            batches: as many such blocks will be put together.
        """
        if self.size <= solvers.CHOLESKY_SIZE:
            return "dense"
        rows = batches * sum(part.shape[0] for part in self.parts)
        return "samples" if self.d == 1 and rows < ROWS * self.fan_in else "preconditioned"

    def solution(self, g: Tensor, damping: float) -> Solution:
        """As ``solve``, with the number of iterations and the error."""
        if self.solver == "diagonal":
            return Solution((1 + damping) * g / (damping + self.diagonal()))
        if self.solver == "kronecker":
            return Solution(self._inverse(damping, KRONECKER_SLACK, 1 + damping)(g))
        if self.way() == "dense":
            return solvers.cholesky(self.dense(), g, damping)
        fewer = self
        if self.weighted:
            slack = self.tolerance * damping / (4 * len(self.parts))
            fewer = replace(self, parts=[part.without_idle_rows(slack) for part in self.parts])
        if fewer.way() == "samples":
            u = joined([part.features for part in fewer.parts])
            q = joined([part.coefficients for part in fewer.parts])
            return solvers.in_sample_space(u, q, g, damping, self.tolerance)
        inverse = self._inverse(damping, PRECONDITIONER_SLACK)
        return solvers.conjugate_gradients(fewer.matvec, g, damping, inverse, self.tolerance)

    def _inverse(self, damping: float, slack: float, factor: float = 1.0) -> Operator:
        """The Kronecker-like inverse from the shared eigenbasis, times a factor."""
        scales = self.unit_scales() if self.scales is None else self.scales
        basis = self.basis
        if basis is None:
            rows = self.root() / mean_scale(scales).sqrt()
            few = len(rows) < self.fan_in
            basis = EigenBasis.of_factor(rows) if few else EigenBasis.of(rows.t() @ rows)
        return basis.inverse(scales / factor, damping / factor, slack)


def joined(pieces: list[Tensor], dim: int = 0) -> Tensor:
    """The pieces in one; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def mean_scale(scales: Tensor) -> Tensor:
    """``Σ_j s_j``, the divisor that makes the mean block a mean of features."""
    total = scales.sum() if scales.ndim == 1 else scales.diagonal(dim1=-2, dim2=-1).sum()
    return total.clamp(min=torch.finfo(scales.dtype).tiny)


Block = UnitBlock | MatrixFreeBlock
