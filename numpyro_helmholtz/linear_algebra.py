"""Solving with a symmetric positive-definite matrix, with the adjoint as its derivative."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve, solve_triangular


def solve_spd(matrix: Array, right: Array) -> Array:
    """``G⁻¹B`` by one Cholesky factor; NaN where G is not positive definite or not finite.

    Its derivative never goes through the factor: ``B̄ = G⁻¹X̄``, ``Ḡ = −B̄Xᵀ``.

    Args:
        matrix: G, (N, N), symmetric and positive definite. right: B, (N, M).
    """
    factor = jnp.linalg.cholesky(lax.stop_gradient(matrix), symmetrize_input=False)
    return lax.custom_linear_solve(
        lambda x: matrix @ x, right, lambda _, b: cho_solve((factor, True), b), symmetric=True
    )


def whitened(matrix: Array, right: Array) -> Array:
    """``L⁻¹B`` with ``LLᵀ = G``, so that its product with itself is ``BᵀG⁻¹B``.

    Rounding may make a smooth kernel's matrix lose its smallest eigenvalues, so its diagonal is
    raised by what rounding can take away: size times machine precision.

    Args:
        matrix: G, (m, m), symmetric and positive semidefinite. right: B, (m, N).
    """
    size = len(matrix)
    jitter = size * jnp.finfo(matrix.dtype).eps * lax.stop_gradient(jnp.diagonal(matrix).mean())
    factor = jnp.linalg.cholesky(matrix + jitter * jnp.eye(size, dtype=matrix.dtype))
    return solve_triangular(factor, right, lower=True)
