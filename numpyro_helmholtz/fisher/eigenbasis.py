"""The eigenbasis that all units of a layer share: preconditioner, and Kronecker-like inverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .solvers import Array, Operator

DROP = 0.02
WIDE = 128  # from this fan-in on, idle eigenvectors are left out


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
    def of(cls, mean_block: Array) -> EigenBasis:
        """Of a symmetric mean block, (size, size)."""
        values, vectors = jnp.linalg.eigh(mean_block, symmetrize_input=False)
        return cls(jnp.maximum(values, 0), vectors)

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

    def inverse(self, g: Array, scales: Array, damping: Array) -> Array:
        """``P_j⁻¹ g``, (units, d·size).

        Eigenvalues with ``max_j s_j λ < DROP·α`` change nothing and are left out where most
        are such: the cost falls from units·size² to units·size·kept. How many are kept is one
        of a few fixed shares of the basis, the smallest that is enough.
        """

        def whole(g: Array) -> Array:
            return self.back(self.scaled_inverse(scales, damping)(self.to(g)))

        if scales.ndim > 1 or self.size < WIDE:
            return whole(g)

        def truncated(kept: int, g: Array) -> Array:
            v = self.vectors[:, self.size - kept :]
            product = scales[:, None] * self.values[self.size - kept :]
            return (g - ((g @ v) * (product / (damping + product))) @ v.T) / damping

        shares = [self.size // 16, self.size // 8, self.size // 4, self.size // 2]
        needed = (self.values * scales.max() >= DROP * damping).sum()
        which = (needed > jnp.asarray(shares)).sum()
        return lax.switch(which, [partial(truncated, kept) for kept in shares] + [whole], g)
