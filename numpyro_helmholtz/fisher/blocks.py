"""Blocks of the Fisher matrix as operators: ``matvec``, ``diagonal``, ``dense``, ``solve``.

A ``UnitBlock`` holds one layer: all units share the features ``U`` (n, l), each has its own
coefficients ``Q`` (n, units), and ``F_j = Uᵀ diag(Q_j) U``. Memory is n·(l + units). Units
that are vectors (categorical logits, coupled families) have (d, d) coefficients and blocks of
size d·l. Whatever has no such form is a ``MatrixFreeBlock``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import branches
from ..columns import Columns
from . import solvers
from .eigenbasis import EigenBasis
from .solvers import Operator, Solution

Array = Any
Arrays = Mapping[str, Array]


KRONECKER_SLACK = 0.35
SHARES = (1 / 8, 1 / 4, 3 / 8)  # of the rows, that may serve for all


@dataclass
class Component:
    """One vector component of a block's units.

    Attributes:
        names, columns: the parameters side by side. units: which rows of them, or None for all.
    """

    names: list[str]
    columns: list[Columns]
    units: np.ndarray | None = None


@dataclass
class UnitBlock:
    """One block per unit over shared features.

    Attributes:
        sites: the sites that the parameters feed. kind: affine, convolution, …, direct.
        components: d of them. features: (n, l). coefficients: (n, units) or (n, units, d, d).
        exact: the information. how: where it comes from.
        basis, scales: of earlier batches, or None for those of this one.
        solver: the form. tolerance: of iterative solves.
        weighted: whether the rows' weights may be unlike, so that some are negligible.
    """

    sites: list[str]
    kind: str
    components: list[Component]
    features: Array
    coefficients: Array
    exact: bool = True
    how: str = "closed form"
    basis: EigenBasis | None = None
    scales: Array | None = None
    solver: str = "unit"
    tolerance: float = 1e-2
    weighted: bool = True

    @property
    def site(self) -> str:
        """Names of the sites that the parameters feed."""
        return ", ".join(self.sites)

    @property
    def params(self) -> list[str]:
        """Names of the parameters."""
        return list(dict.fromkeys(name for c in self.components for name in c.names))

    @property
    def key(self) -> str:
        """What identifies the block from batch to batch."""
        return " + ".join(self.params)

    @property
    def arrays(self) -> dict[str, Any]:
        """What changes from batch to batch, a pytree."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def with_arrays(self, arrays: Mapping[str, Any]) -> UnitBlock:
        """The same block with other arrays."""
        return replace(self, **arrays)

    @property
    def d(self) -> int:
        """Number of components of a unit."""
        return len(self.components)

    @property
    def units(self) -> int:
        """Number of blocks."""
        return int(self.coefficients.shape[1])

    @property
    def rows(self) -> int:
        """Number of rows of the features."""
        return int(self.features.shape[0])

    @property
    def fan_in(self) -> int:
        """Number of features, the bias included."""
        return int(self.features.shape[1])

    @property
    def size(self) -> int:
        """Rows of one block."""
        return self.d * self.fan_in

    def gather(self, arrays: Arrays) -> Array:
        """Parameters' arrays by name as (units, size)."""
        # Transposed back and forth: XLA copies nothing where weights lie as (fan-in, units).
        rows = []
        for component in self.components:
            named = zip(component.names, component.columns, strict=True)
            whole = _joined([column.to_units(arrays[name]).T for name, column in named])
            rows.append(whole if component.units is None else whole[:, component.units])
        return _joined(rows).T

    def scatter(self, x: Array) -> dict[str, Array]:
        """The inverse of ``gather``."""
        flat: dict[str, Array] = {}
        matrices: dict[str, Array] = {}
        columns: dict[str, Columns] = {}
        rows, start = x.T, 0
        for component in self.components:
            for name, column in zip(component.names, component.columns, strict=True):
                value = rows[start : start + column.shape[1]]
                start += column.shape[1]
                if component.units is None:
                    flat[name] = column.to_leaf(value.T)
                    continue
                known = matrices.get(name, jnp.zeros(column.shape, x.dtype))
                matrices[name] = known.at[component.units].set(value.T)
                columns[name] = column
        return flat | {name: columns[name].to_leaf(m) for name, m in matrices.items()}

    # the operator

    def matvec(self, v: Array) -> Array:
        """``F v``, (units, size) → (units, size)."""
        return _product(self.features, self.coefficients)(v)

    def diagonal(self) -> Array:
        """The diagonal of every block, (units, size)."""
        q = self._own_coefficients()
        return jnp.einsum("ngi,nl->gil", q, self.features**2).reshape(self.units, self.size)

    def dense(self) -> Array:
        """All blocks, (units, size, size)."""
        u, q = self.features, self.coefficients
        if q.ndim == 2:
            return (q.T[:, None, :] * u.T) @ u
        value = jnp.einsum("ngij,nk,nl->gikjl", q, u, u)
        return value.reshape(self.units, self.size, self.size)

    def mean_block(self) -> Array:
        """``Σ_n Σ_j tr(Q_nj) u_n u_nᵀ``, (fan-in, fan-in): all units together."""
        weight = self._own_coefficients().sum((1, 2))
        return (self.features * weight[:, None]).T @ self.features

    def unit_scales(self) -> Array:
        """``s_j = Σ_n Q_nj``, (units,) or (units, d, d)."""
        return self.coefficients.sum(0)

    def _own_coefficients(self) -> Array:
        """Coefficients of each component with itself, (n, units, d)."""
        q = self.coefficients
        return q[..., None] if q.ndim == 2 else jnp.diagonal(q, axis1=-2, axis2=-1)

    # solves

    def solve(self, g: Array, damping: Array | float) -> Array:
        """``(1+α)(αI + F)⁻¹ g``, (units, size), by the block's solver."""
        return self.solution(g, damping).x

    def method(self) -> str:
        """The solver's name, for the structure report."""
        if self.solver == "diagonal":
            return "diagonal"
        if self.solver == "kronecker":
            start = "" if self.basis is None else "; diagonal in the first step"
            return f"Kronecker (shared eigenbasis to {KRONECKER_SLACK:.0%}, unit scales{start})"
        if self.size <= solvers.CHOLESKY_SIZE:
            return "Cholesky"
        over = " over samples" if self._few_rows() else ""
        return f"conjugate gradients{over} to {self.tolerance:g}"

    def needs_basis(self, rows: int) -> bool:
        """Whether exact blocks are solved in an eigenbasis, given so many rows."""
        return self.size > solvers.CHOLESKY_SIZE and not self._few_rows(rows)

    def _few_rows(self, rows: int | None = None) -> bool:
        rows = self.rows if rows is None else rows
        return self.d == 1 and rows < solvers.FEW * self.fan_in

    def solution(self, g: Array, damping: Array | float) -> Solution:
        """As ``solve``, with the number of iterations and the error."""
        if self.solver == "diagonal":
            return Solution((1 + damping) * g / (damping + self.diagonal()))
        if self.solver == "kronecker":
            basis, scales = self._basis_and_scales()
            return Solution((1 + damping) * basis.inverse(g, scales, damping, KRONECKER_SLACK))
        if self.size <= solvers.CHOLESKY_SIZE:
            return solvers.direct(self.dense(), g, damping)
        if not self.weighted or self.rows * self.size * self.units < solvers.LARGE:
            return self._with_all_rows(g, damping)
        return self._without_idle_rows(g, damping)

    def _with_all_rows(self, g: Array, damping: Array | float) -> Solution:
        if self._few_rows():
            u, q = self.features, self.coefficients
            return solvers.in_sample_space(u, q, g, damping, self.tolerance)
        return self._in_eigenbasis(g, damping)

    def _without_idle_rows(self, g: Array, damping: Array | float) -> Solution:
        """Leave out rows of negligible weight where most are such.

        Particles of negligible weight cost as much as the others and change nothing. The
        smallest of ``SHARES`` of the rows serves with which, in every block, the others have
        less than a quarter of the tolerance of ``α + tr F_j``.
        """
        counts = [math.ceil(share * self.rows) for share in SHARES]
        weights = self._own_coefficients().sum(-1)
        square = (self.features**2).sum(1)
        order = lax.top_k(weights.max(1) * square, counts[-1])[1]
        place = jnp.full(self.rows, self.rows).at[order].set(jnp.arange(counts[-1]))
        left = jnp.where(place >= np.array([[0], *([c] for c in counts)]), square, 0)
        left = left @ weights  # of all rows, then without the first so many
        idle = (left[1:] <= self.tolerance / 4 * (damping + left[0])).all(1)

        def over(count: int, g: Array) -> Solution:
            u, q = self.features[order[:count]], self.coefficients[order[:count]]
            return replace(self, features=u, coefficients=q)._with_all_rows(g, damping)

        ways = [partial(over, c) for c in counts]
        return branches.switch((~idle).sum(), [*ways, lambda g: self._with_all_rows(g, damping)], g)

    def _basis_and_scales(self) -> tuple[EigenBasis, Array]:
        scales = self.unit_scales() if self.scales is None else self.scales
        if self.basis is not None:
            return self.basis, scales
        return EigenBasis.of(self.mean_block(), mean_scale(scales)), scales

    def _in_eigenbasis(self, g: Array, damping: Array | float) -> Solution:
        """Conjugate gradients with everything turned into the shared eigenbasis once."""
        basis, scales = self._basis_and_scales()
        turned = self.features @ basis.vectors
        solution = solvers.conjugate_gradients(
            _product(turned, self.coefficients),
            basis.to(g),
            damping,
            basis.scaled_inverse(scales, damping),
            self.tolerance,
        )
        return solution._replace(x=basis.back(solution.x))


_ARRAYS = ("features", "coefficients", "basis", "scales")


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _product(u: Array, q: Array) -> Operator:
    """``v ↦ Σ_n u_n Q_nj u_nᵀ v_j`` for all units."""
    if q.ndim == 2:
        turned = q.T  # once, not in each iteration of a loop
        return lambda v: ((v @ u.T) * turned) @ u

    def product(v: Array) -> Array:
        inner = v.reshape(q.shape[1], q.shape[2], -1) @ u.T
        return (jnp.einsum("ngij,gjn->gin", q, inner) @ u).reshape(v.shape)

    return product


def mean_scale(scales: Array) -> Array:
    """``Σ_j s_j``, the divisor that makes the mean block a mean of features."""
    total = scales.sum() if scales.ndim == 1 else jnp.trace(scales, axis1=-2, axis2=-1).sum()
    return jnp.maximum(total, jnp.finfo(scales.dtype).tiny)
