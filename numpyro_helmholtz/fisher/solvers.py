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

    Args:
        features: U, (n, fan-in). coefficients: Q, (n, units), not negative. g: (units, fan-in).
        damping: α > 0. tolerance: bound on ``‖x − x*‖ / ‖x‖`` over all units together.
        max_iterations: at most so many products.
    """
    tiny = jnp.finfo(g.dtype).tiny
    root = jnp.sqrt(jnp.maximum(coefficients, 0)).T
    gram = features @ features.T
    b = (g @ features.T) * root
    square = (g * g).sum()
    inverse, turned = _diagonal_and_one(root, gram, coefficients.sum(1), damping)

    def inner(a: Array, b: Array) -> Array:
        return (a * b).sum(-1, keepdims=True)

    def lengths(r: Array) -> tuple[Array, Array]:
        """``turnedᵀ r`` and ``rᵀz`` of the preconditioned residual z, without z."""
        along = inner(turned, r)
        return along, jnp.maximum(inner(r, r * inverse) - along**2, 0)

    def go_on(state: tuple) -> Array:
        *_, error, done = state
        return (error > tolerance) & (done < max_iterations)

    def iterate(state: tuple) -> tuple:
        y, r, p, rz, overlap, _, done = state
        product = root * ((root * p) @ gram) + damping * p
        step = rz / jnp.maximum(inner(p, product), tiny)
        y, r = y + step * p, r - step * product
        along, new = lengths(r)
        overlap = overlap + (step * rz).sum()
        # ‖V B⁻¹ r‖ ≤ ‖r‖ / 2√α, and ‖g − V y‖² = ‖g‖² − yᵀb − α‖y‖², since yᵀr = 0
        length = square - overlap - damping * (y * y).sum()
        error = jnp.sqrt((r * r).sum() / (4 * damping * jnp.maximum(length, tiny)))
        ratio = new / jnp.maximum(rz, tiny)
        return y, r, r * inverse - turned * along + ratio * p, new, overlap, error, done + 1

    along, rz = lengths(b)
    one, zero = jnp.ones((), g.dtype), jnp.zeros((), int)
    start = (jnp.zeros_like(b), b, b * inverse - turned * along, rz, 0 * one, one, zero)
    y, *_, error, done = lax.while_loop(go_on, iterate, start)
    return Solution((1 + damping) / damping * (g - (y * root) @ features), done, error)


def _diagonal_and_one(
    root: Array, gram: Array, share: Array, damping: Array
) -> tuple[Array, Array]:
    """The inverse of ``diag + a aᵀ`` for each unit, near to ``αI + diag(√Q) G diag(√Q)``.

    Features that have a mean, as all binary ones have, give G one eigenvalue far above the
    others. Left to conjugate gradients, it comes back by rounding, larger by its ratio to the
    others in each iteration, and costs iterations (in float32 from the third on).

    Args:
        root: √Q, (units, n). gram: G, (n, n). share: of the rows, (n,). damping: α > 0.

    Returns:
        ``inverse`` and ``turned``, (units, n), of ``r ↦ inverse r − turned turnedᵀ r``.
    """
    image = gram @ share
    top = image * lax.rsqrt(jnp.maximum(image @ share, jnp.finfo(gram.dtype).tiny))
    rest = jnp.maximum(jnp.diagonal(gram) - top * top, 0)  # G − top topᵀ is positive
    inverse = 1 / (damping + root * root * rest)
    one = root * top
    turned = one * inverse
    return inverse, turned * lax.rsqrt(1 + (one * turned).sum(-1, keepdims=True))
