"""The eigenbasis that all units of a layer share: preconditioner, and Kronecker-like inverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .solvers import Array, Operator

SMALL = 64  # no band below this size
STARTS = 32  # about so many places are tried for the band's start
PARTS = 16  # at most about so many parts for what is outside the band


@partial(jax.tree_util.register_dataclass, data_fields=["values", "vectors"], meta_fields=[])
@dataclass(frozen=True)
class EigenBasis:
    """The shared eigenbasis of a layer's mean block ``C = Uᵀ diag(q̄) U / Σ q̄``.

    ``P_j⁻¹ = V diag(1/(α + s_j λ)) Vᵀ`` with the unit's scale ``s_j = Σ_n Q_nj``; for coupled
    units ``s_j`` is a (d, d) matrix with an eigenbasis of its own.

    Attributes:
        values, vectors: (size,), (size, size) ascending.
    """

    values: Array
    vectors: Array

    @classmethod
    def of(cls, block: Array, total: Array | float = 1.0) -> EigenBasis:
        """Of a symmetric block, (size, size), over ``total``."""
        # LAPACK reads columns: a symmetric matrix is the same by its rows, and is not turned.
        values, vectors = jnp.linalg.eigh(block.T, symmetrize_input=False)
        return cls(jnp.maximum(values, 0) / total, vectors)

    @property
    def size(self) -> int:
        """Number of features."""
        return int(self.vectors.shape[0])

    def to(self, g: Array) -> Array:
        """(units, d·size) in the eigenbasis."""
        return (g.reshape(-1, self.size) @ self.vectors).reshape(g.shape)

    def back(self, x: Array) -> Array:
        """The inverse of ``to``."""
        return (x.reshape(-1, self.size) @ self.vectors.T).reshape(x.shape)

    def scaled_inverse(self, scales: Array, damping: Array) -> Operator:
        """``P_j⁻¹`` on vectors that stand in the eigenbasis: no product with it is needed.

        Args:
            scales: (units,) or (units, d, d). damping: α > 0.
        """
        if scales.ndim == 1:
            inverse = 1 / (damping + scales[:, None] * self.values)
            return lambda g: g * inverse
        inner, w = jnp.linalg.eigh(scales, symmetrize_input=False)
        inverse = 1 / (damping + jnp.maximum(inner, 0)[..., None] * self.values)

        def apply(g: Array) -> Array:
            inside = jnp.swapaxes(w, 1, 2) @ g.reshape(*inner.shape, -1)
            return (w @ (inside * inverse)).reshape(g.shape)

        return apply

    def inverse(self, g: Array, scales: Array, damping: Array, slack: float = 0.0) -> Array:
        """``P_j⁻¹ g``, (units, d·size).

        Eigenvalues in a band that the damping hardly tells apart count as one: then the
        inverse is a multiple of the identity but for the others, and costs
        units·size·others instead of units·size². The others are taken a few at a time.

        Args:
            g: (units, d·size). scales: (units,) or (units, d, d). damping: α > 0.
            slack: largest relative change of ``1/(α + s λ)`` by the band, below 1.
        """
        if self.size <= SMALL or slack <= 0:
            return self.back(self.scaled_inverse(scales, damping)(self.to(g)))
        if scales.ndim > 1:
            inner, turn = jnp.linalg.eigh(scales, symmetrize_input=False)
            turned = jnp.swapaxes(turn, 1, 2) @ g.reshape(*inner.shape, -1)
            apart = jnp.maximum(inner, 0).reshape(-1)
            inside = self.inverse(turned.reshape(-1, self.size), apart, damping, slack)
            return (turn @ inside.reshape(turned.shape)).reshape(g.shape)
        low, high = self._band(scales.max(), damping, slack)
        middle = (_taken(self.values, low) + _taken(self.values, high - 1)) / 2
        rest = 1 / (damping + scales * middle)
        others = self.size - (high - low)
        width = max(SMALL // 2, -(-self.size // PARTS))
        columns = g.T  # as a layer's weights mostly lie: nothing has to be turned

        def change(part: Array | int) -> Array:
            place = part * width + jnp.arange(width)  # counted from the end of the band on
            which = lax.rem(high + place, self.size)
            v = _taken(self.vectors.T, which).T
            apart = 1 / (damping + scales * _taken(self.values, which)[:, None]) - rest
            return v @ ((v.T @ columns) * jnp.where((place < others)[:, None], apart, 0))

        # One part nearly always serves: it is not in the loop, where it would be added by itself.
        parts = -(-others // width)
        changes = lax.fori_loop(1, parts, lambda part, x: x + change(part), change(0))
        return (columns * rest + changes).T

    def _band(self, scale: Array, damping: Array, slack: float) -> tuple[Array, Array]:
        """First and last plus one of the most eigenvalues that may count as one.

        ``s (λ₂ − λ₁)/2 ≤ slack (α + s (λ₂ + λ₁)/2)``; it starts at one of ``STARTS`` places.
        """
        tiny = jnp.finfo(self.values.dtype).tiny
        room = 2 * slack * damping / jnp.maximum(scale, tiny)
        starts = np.arange(0, self.size, max(1, self.size // STARTS))
        top = (room + (1 + slack) * self.values[starts]) / (1 - slack)
        ends = jnp.maximum((self.values <= top[:, None]).sum(1), starts + 1)
        best = (ends - starts).argmax()
        return _taken(jnp.asarray(starts), best), _taken(ends, best)


def _taken(x: Array, which: Array) -> Array:
    """``x[which]``, where nothing is outside of the array: no index has to be looked at."""
    return x.at[which].get(mode="promise_in_bounds", wrap_negative_indices=False)
