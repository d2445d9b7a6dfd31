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
FAST = 0.5  # a solve that leaves less of its error in an iteration may end with a last step
MARGIN = 1.25  # the last step may leave so much more of the error than an iteration


class Solution(NamedTuple):
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm; in the space of the samples a
            bound on the relative error of x. After a last step: what it is expected to leave.
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

    A solve that goes fast ends with a last step, see ``_gain``.

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

    def relative(lengths: Array) -> Array:
        return jnp.sqrt(lengths[0] / total)

    def go_on(state: tuple) -> Array:
        *_, lengths, done = state
        return (relative(lengths) * _gain(lengths) > tolerance) & (done < max_iterations)

    def iterate(state: tuple) -> tuple:
        x, r, p, rz, _, lengths, done = state
        product = matvec(p) + damping * p
        curvature = inner(p, product)
        flat = curvature <= 0  # not true of NaN, which must show
        step = jnp.where(flat, 0, rz / jnp.where(flat, 1, curvature))
        x, r = x + step * p, r - step * product
        z = precondition(r)
        new = inner(r, z)
        ratio = jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1), 0)
        return x, r, z + ratio * p, new, step, _onto(lengths, new), done + 1

    r = (1 + damping) * g
    z = precondition(r)
    rz = inner(r, z)
    total = jnp.maximum(rz.sum(), jnp.finfo(g.dtype).tiny)
    start = (jnp.zeros_like(g), r, z, rz, jnp.zeros_like(rz), jnp.full(3, total))
    state = lax.while_loop(go_on, iterate, (*start, jnp.zeros((), int)))
    x, _, p, _, step, lengths, done = state
    last, error = _last(step, relative(lengths), lengths, tolerance)
    return Solution(x + last * p, done, error)


def _onto(lengths: Array, new: Array) -> Array:
    """Lengths ``rᵀz`` of residuals, all units together, with that of a new one in front."""
    length = jnp.maximum(new.sum(), jnp.finfo(new.dtype).tiny)
    return jnp.concatenate([length[None], lengths[:2]])


def _gain(lengths: Array) -> Array:
    """What a last step is expected to leave of the error.

    An iteration needs its product for the length of its step. Where a solve goes fast, the
    lengths vary little. So a last step along the next direction, as long as the one before,
    needs no product and serves nearly as well as an iteration. It is not verified: the error
    is expected to fall as in the slower one of the last two iterations, and a quarter less.

    Args:
        lengths: of the residuals of the last three iterations, the last one first.
    """
    slow = jnp.sqrt(jnp.maximum(lengths[0] / lengths[1], lengths[1] / lengths[2]))
    return jnp.where(slow < FAST, MARGIN * slow, 1)


def _last(step: Array, error: Array, lengths: Array, tolerance: float) -> tuple[Array, Array]:
    """The length of a last step, zero where there is none, and the error after it."""
    left = error * _gain(lengths)
    taken = (error > tolerance) & (left <= tolerance)
    return jnp.where(taken, step, 0), jnp.where(taken, left, error)


def in_sample_space(
    features: Array,
    coefficients: Array,
    g: Array,
    damping: Array,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
) -> Solution:
    """Solve in the space of the rows, which is the smaller one where they are few.

    The solution is ``x_j = (1+α)/α (g_j − Uᵀ w_j)``, where ``(α Q_j⁻¹ + G) w_j = U g_j`` with
    ``G = UUᵀ``; rows without weight do no harm. G serves all units, so that a step of conjugate
    gradients costs units·n² instead of units·n·fan-in. The solve stops by a bound on the error
    of x (see ``_Near.bound``), with a last step where it goes fast (see ``_gain``).

    Args:
        features: U, (n, fan-in). coefficients: Q, (n, units), not negative. g: (units, fan-in).
        damping: α > 0. tolerance: of ``‖x − x*‖ / ‖x‖`` over all units together; the error is
            bounded by it, after a last step only expected to be below it.
        max_iterations: at most so many products.
    """
    tiny = jnp.finfo(g.dtype).tiny
    columns = g.T  # as a layer's weights mostly lie: nothing has to be turned
    gram = features @ features.T
    near = _Near.of(coefficients, gram, damping)
    square = (columns * columns).sum(0).sum()  # in two stages: XLA is slow at both in one

    def go_on(state: tuple) -> Array:
        *_, lengths, error, done = state
        return (error * _gain(lengths) > tolerance) & (done < max_iterations)

    def iterate(state: tuple) -> tuple:
        w, r, p, along, ratio, rz, overlap, _, lengths, _, done = state
        p = near.inverse(r, along) + ratio * p
        product = gram @ p + near.own * p
        step = rz / jnp.maximum((p * product).sum(0), tiny)
        w, r = w + step * p, r - step * product
        along, new = near.lengths(r)
        overlap, done = overlap + (step * rz).sum(), done + 1
        left, lengths = square - overlap, _onto(lengths, new)

        def bound() -> Array:
            # ‖g − Uᵀw‖² = ‖g‖² − wᵀUg − wᵀ(αQ⁻¹)w, since wᵀr = 0
            length = left - (near.own * (w * w)).sum(0).sum()
            return jnp.sqrt(near.bound(r, along) / jnp.maximum(length, tiny))

        # The bound is at least √(rᵀz)/2, over a length of at most √left: most often not needed.
        least = _gain(lengths) ** 2 * lengths[0]
        far = (least > 4 * tolerance**2 * left) & (done < max_iterations)
        error = lax.cond(far, lambda: jnp.full((), jnp.inf, g.dtype), bound)
        ratio = new / jnp.maximum(rz, tiny)
        return w, r, p, along, ratio, new, overlap, step, lengths, error, done

    r = features @ columns
    along, rz = near.lengths(r)
    zeros, none, zero = jnp.zeros_like(r), jnp.zeros_like(rz), jnp.zeros((), g.dtype)
    lengths = jnp.full(3, jnp.maximum(rz.sum(), tiny))
    start = (zeros, r, zeros, along, none, rz, zero, none, lengths, zero + 1)
    state = lax.while_loop(go_on, iterate, (*start, jnp.zeros((), int)))
    w, r, p, along, ratio, _, _, step, lengths, error, done = state
    last, error = _last(step, error, lengths, tolerance)
    w = w + last * (near.inverse(r, along) + ratio * p)
    x = (1 + damping) / damping * (columns - features.T @ w)
    return Solution(x.T, done, error)


class _Near(NamedTuple):
    """``W_j⁻¹ + top topᵀ``, a diagonal and one, near to ``αQ_j⁻¹ + G``.

    Features that have a mean, as all binary ones have, give G one eigenvalue far above the
    others. Left to conjugate gradients, it comes back by rounding, larger by its ratio to the
    others in each iteration, and costs iterations (in float32 from the third on).

    Attributes:
        q: Q, (n, units). own: αQ⁻¹. weight: W.
        top: of G, (n, 1). size: ``topᵀ W_j top``, (units,). damping: α.
        reach: ``|a|² / (α + |a|²)`` with ``a = √Q_j top``, see ``bound``, (units,).
    """

    q: Array
    own: Array
    weight: Array
    top: Array
    size: Array
    damping: Array
    reach: Array

    @classmethod
    def of(cls, coefficients: Array, gram: Array, damping: Array) -> _Near:
        """Of coefficients (n, units), and of G, (n, n)."""
        limits = jnp.finfo(gram.dtype)
        least = damping * limits.tiny**0.5  # as good as none; products with it are normal numbers
        q = jnp.maximum(coefficients, least)
        own = damping / q
        share = q.sum(1)
        image = gram @ share
        top = image * lax.rsqrt(jnp.maximum(image @ share, limits.tiny))
        rest = jnp.maximum(jnp.diagonal(gram) - top * top, 0)  # G − top topᵀ is positive
        weight = 1 / (own + rest[:, None])
        size, square = (top * top) @ weight, (top * top) @ q
        reach = square / (damping + square)
        return cls(q, own, weight, top[:, None], size, damping, reach)

    def lengths(self, r: Array) -> tuple[Array, Array]:
        """``topᵀWr``, and ``rᵀz`` with z the inverse times r, both (units,)."""
        along = (self.weight * self.top * r).sum(0)
        square = (self.weight * (r * r)).sum(0)
        return along, jnp.maximum(square - along**2 / (1 + self.size), 0)

    def inverse(self, r: Array, along: Array) -> Array:
        """``(W⁻¹ + top topᵀ)⁻¹ r``, (n, units)."""
        return self.weight * (r - self.top * (along / (1 + self.size)))

    def bound(self, r: Array, along: Array) -> Array:
        """A bound on ``‖Uᵀ(αQ⁻¹ + G)⁻¹ r‖²``, the error of x but for a factor, over all units.

        In the scale of ``V = Uᵀ√Q`` and ``B = αI + VᵀV`` the error is ``‖VB⁻¹√Q r‖``. With
        ``a = √Q top`` and ``√Q r = μa + s``: ``‖VB⁻¹s‖ ≤ ‖s‖ / 2√α``, and
        ``‖VB⁻¹a‖² ≤ |a|² / (α + |a|²)``, since B is at least ``αI + aaᵀ``. Most of the
        residual may stand along a, where it counts least.
        """
        mean = along / jnp.maximum(self.size, jnp.finfo(r.dtype).tiny)
        rest = r - mean * self.top
        square = (self.q * (rest * rest)).sum(0)
        error = jnp.abs(mean) * jnp.sqrt(self.reach) + jnp.sqrt(square / self.damping) / 2
        return (error * error).sum()
