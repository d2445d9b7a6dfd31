"""Solve ``(αI + F_j) x_j = (1+α) g_j`` for all units of a block at once.

Renormalised Tikhonov damping: α → ∞ gives the gradient back, α → 0 the natural gradient
(Várady 2025, section 5.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, cholesky

Array = Any
Operator = Callable[[Array], Array]
CHOLESKY_SIZE = 8
LARGE = 1 << 21  # from so many products on, rows of negligible weight are left out
FEW = 2  # rows are few below so many for each feature: a product is cheaper in their space


class Solution(NamedTuple):
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm; in the space of the samples a
            bound on the relative error of x.
    """

    x: Array
    iterations: Array | int = 0
    error: Array | float = 0.0


def direct(matrix: Array, g: Array, damping: Array) -> Solution:
    """Cholesky solve with dense blocks.

    Args:
        matrix: (units, size, size). g: (units, size). damping: α > 0.
    """
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    factor = cholesky(matrix + damping * eye, lower=True)
    return Solution(cho_solve((factor, True), (1 + damping) * g[..., None])[..., 0])


def conjugate_gradients(
    matvec: Operator,
    g: Array,
    damping: Array,
    precondition: Operator | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
) -> Solution:
    """Preconditioned conjugate gradients over all units at once, started from zero.

    Args:
        matvec: F, on (units, size). g: (units, size). damping: α > 0.
        precondition: an approximate inverse of αI + F.
        tolerance: stop when the residual of all units together, in the preconditioner's norm
            (about the error in the norm of αI + F), is below this share of its start.
        max_iterations: at most so many products with F.
    """
    precondition = precondition or (lambda r: r / damping)

    def inner(a: Array, b: Array) -> Array:
        return (a * b).sum(-1, keepdims=True)

    def go_on(state: tuple) -> Array:
        *_, error, done = state
        return (error > tolerance) & (done < max_iterations)

    def iterate(state: tuple) -> tuple:
        x, r, p, rz, _, done = state
        product = matvec(p) + damping * p
        curvature = inner(p, product)
        flat = curvature <= 0  # not true of NaN, which must show
        step = jnp.where(flat, 0, rz / jnp.where(flat, 1, curvature))
        x, r = x + step * p, r - step * product
        z = precondition(r)
        new = inner(r, z)
        ratio = jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1), 0)
        error = jnp.sqrt(jnp.maximum(new.sum() / total, 0))
        return x, r, z + ratio * p, new, error, done + 1

    r = (1 + damping) * g
    z = precondition(r)
    rz = inner(r, z)
    total = jnp.maximum(rz.sum(), jnp.finfo(g.dtype).tiny)
    start = (jnp.zeros_like(g), r, z, rz, jnp.ones((), g.dtype), jnp.zeros((), int))
    x, *_, error, done = lax.while_loop(go_on, iterate, start)
    return Solution(x, done, error)


def in_sample_space(
    features: Array,
    coefficients: Array,
    g: Array,
    damping: Array,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
) -> Solution:
    """Solve in the space of the rows, which is the smaller one where they are few.

    With ``V_j = Uᵀ diag(√Q_j)`` the solution is ``x_j = (1+α)/α (g_j − V_j y_j)``, where
    ``B_j y_j = V_jᵀ g_j`` and ``B_j = αI + V_jᵀV_j``. ``UUᵀ`` serves all units, so that a step
    of conjugate gradients costs units·n² instead of units·n·fan-in. Idle rows do no harm.

    The error of x is ``‖V B⁻¹ r‖`` with the residual ``r = μa + s``, where a is the mean's part
    of B: ``‖V B⁻¹ s‖ ≤ ‖s‖ / 2√α``, and ``‖V B⁻¹ a‖² ≤ |a|² / (α + |a|²)``, since B is at least
    ``αI + aaᵀ``. Most of the residual may stand along a, where it counts least.

    Args:
        features: U, (n, fan-in). coefficients: Q, (n, units), not negative. g: (units, fan-in).
        damping: α > 0. tolerance: bound on ``‖x − x*‖ / ‖x‖`` over all units together.
        max_iterations: at most so many products.
    """
    tiny = jnp.finfo(g.dtype).tiny
    columns = g.T  # as a layer's weights mostly lie: nothing has to be turned
    gram = features @ features.T
    root, shift, one, reach = _diagonal_and_one(coefficients, gram, damping)
    turned = one * lax.rsqrt(1 + (one * one).sum(0))  # (I + one oneᵀ)⁻¹ = I − turned turnedᵀ
    across = jnp.maximum((turned * one).sum(0), tiny)
    square = (columns * columns).sum(0).sum()  # in two stages: XLA is slow at both in one

    def lengths(r: Array) -> tuple[Array, Array]:
        """``turnedᵀ r`` and ``rᵀz`` of the preconditioned residual ``z = r − turned turnedᵀ r``."""
        along = (turned * r).sum(0)
        return along, jnp.maximum((r * r).sum(0) - along**2, 0)

    def bound(y: Array, r: Array, along: Array, overlap: Array) -> Array:
        mean = along / across
        rest = r - mean * one
        error = jnp.abs(mean) * reach + jnp.sqrt((rest * (rest / shift)).sum(0)) / 2
        # ‖g − V y‖² = ‖g‖² − yᵀb − α‖y‖², since yᵀr = 0
        length = square - overlap - (y * (y * shift)).sum(0).sum()
        return jnp.sqrt((error * error).sum() / jnp.maximum(length, tiny))

    def go_on(state: tuple) -> Array:
        *_, error, done = state
        return (error > tolerance) & (done < max_iterations)

    def iterate(state: tuple) -> tuple:
        y, r, p, along, ratio, rz, overlap, _, done = state
        p = r - turned * along + ratio * p
        product = root * (gram @ (root * p)) + shift * p
        step = rz / jnp.maximum((p * product).sum(0), tiny)
        y, r = y + step * p, r - step * product
        along, new = lengths(r)
        overlap = overlap + (step * rz).sum()
        error = bound(y, r, along, overlap)
        return y, r, p, along, new / jnp.maximum(rz, tiny), new, overlap, error, done + 1

    b = root * (features @ columns)
    along, rz = lengths(b)
    zeros, zero = jnp.zeros_like(b), jnp.zeros((), g.dtype)
    start = (zeros, b, zeros, along, jnp.zeros_like(rz), rz, zero, zero + 1, jnp.zeros((), int))
    y, *_, error, done = lax.while_loop(go_on, iterate, start)
    x = (1 + damping) / damping * (columns - features.T @ (root * y))
    return Solution(x.T, done, error)


def _diagonal_and_one(
    coefficients: Array, gram: Array, damping: Array
) -> tuple[Array, Array, Array, Array]:
    """``B_j`` and ``D_j + a_j a_jᵀ`` near to it, in the scale in which the diagonal D is I.

    Features that have a mean, as all binary ones have, give G one eigenvalue far above the
    others. Left to conjugate gradients, it comes back by rounding, larger by its ratio to the
    others in each iteration, and costs iterations (in float32 from the third on).

    Args:
        coefficients: Q, (n, units). gram: G, (n, n). damping: α > 0.

    Returns:
        ``root`` and ``shift``, (n, units), with ``D^-½ B D^-½ = diag(root) G diag(root) +
        diag(shift)``; ``one``, ``D^-½ a``; ``reach``, (units,), a bound on ``‖V B⁻¹ a‖``.
    """
    q = jnp.maximum(coefficients, 0)
    share = q.sum(1)
    image = gram @ share
    top = image * lax.rsqrt(jnp.maximum(image @ share, jnp.finfo(gram.dtype).tiny))
    rest = jnp.maximum(jnp.diagonal(gram) - top * top, 0)  # G − top topᵀ is positive
    shift = damping / (damping + q * rest[:, None])
    root = jnp.sqrt(q * shift / damping)
    square = (top * top) @ q
    return root, shift, root * top[:, None], jnp.sqrt(square / (damping + square))
