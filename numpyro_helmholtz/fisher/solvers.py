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
LARGE = 1 << 22  # from so many products on, rows of negligible weight are left out
FEW = 4  # so many times fewer rows than features are solved over the rows


class Solution(NamedTuple):
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm.
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


def over_rows(u: Array, q: Array, g: Array, damping: Array, tolerance: float = 1e-2) -> Solution:
    """Conjugate gradients in the space of the rows, for far fewer rows than features.

    With ``V = Uᵀ√Q_j``: ``x = (1+α)/α (g − V y)``, ``(αI + VᵀV) y = Vᵀ g``. The residual of
    ``x`` is ``V r/α`` for the residual ``r`` of ``y``, so the error of ``x`` in the norm of
    αI + F is at most ``|V r| / α^(3/2)``, and that is what is stopped on.

    Args:
        u: (n, l). q: (n, units), not negative. g: (units, l). damping: α > 0.
        tolerance: bound on the relative error of all units together in the norm of αI + F.
    """
    root = jnp.sqrt(jnp.maximum(q, 0)).T
    gram = u @ u.T
    right = (g @ u.T) * root
    square = (g * g).sum()

    def inner(a: Array, b: Array) -> Array:
        return (a * b).sum(-1, keepdims=True)

    def apply(v: Array) -> Array:
        return root * ((root * v) @ gram)

    def go_on(state: tuple) -> Array:
        *_, error, done = state
        return (error > tolerance) & (done < 4 * len(u))

    def iterate(state: tuple) -> tuple:
        y, r, p, image, rr, _, done = state
        product = image + damping * p
        step = rr / jnp.maximum(inner(p, product), tiny)
        y, r = y + step * p, r - step * product
        new = inner(r, r)
        ratio = new / jnp.maximum(rr, tiny)
        moved = apply(r)
        size = jnp.maximum((square - (right * y).sum()) * damping**2, tiny)
        error = jnp.sqrt(jnp.maximum((r * moved).sum(), 0) / size)
        return y, r, r + ratio * p, moved + ratio * image, new, error, done + 1

    tiny = jnp.finfo(g.dtype).tiny
    start = (right * 0, right, right, apply(right), inner(right, right))
    one, zero = jnp.ones((), g.dtype), jnp.zeros((), int)
    y, *_, error, done = lax.while_loop(go_on, iterate, (*start, one, zero))
    return Solution((1 + damping) / damping * (g - (y * root) @ u), done, error)
