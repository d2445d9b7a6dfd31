"""Solve ``(αI + F_j) x_j = (1+α) g_j`` for all units of a block at once.

Renormalised Tikhonov damping: α → ∞ gives the gradient back, α → 0 the natural gradient
(Várady 2025, section 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
CHOLESKY_SIZE = 24
FAST = 0.5  # a solve that leaves less of its error in an iteration may end with a last step
MARGIN = 1.25  # the last step may leave so much more of the error than an iteration


@dataclass
class Solution:
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm; in the space of the samples a
            bound on the relative error of x. After a last step: what it is expected to leave.
    """

    x: Tensor
    iterations: int = 0
    error: float = 0.0


def cholesky(matrix: Tensor, g: Tensor, damping: float) -> Solution:
    """Direct solve with dense blocks.

    Args:
        matrix: (units, size, size). g: (units, size). damping: α > 0.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + damping * eye)
    if bool((info != 0).any()):
        raise FloatingPointError("a damped Fisher block is not positive definite")
    x = torch.cholesky_solve((1 + damping) * g[..., None], factor)[..., 0]
    return Solution(x)


def conjugate_gradients(
    matvec: Operator,
    g: Tensor,
    damping: float,
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
    r = (1 + damping) * g  # changed in place below, as are x and every z
    z = precondition(r)
    p, x = z, torch.zeros_like(g)
    rz = (r * z).sum(-1, keepdim=True)
    lengths = [_length(rz)] * 3
    total, error, done = lengths[0], 1.0, 0
    while done < max_iterations:
        done += 1
        product = matvec(p).add_(p, alpha=damping)
        step = _ratio(rz, (p * product).sum(-1, keepdim=True))
        x.addcmul_(step, p)
        r.addcmul_(step, product, value=-1)
        z = precondition(r)
        new = (r * z).sum(-1, keepdim=True)
        lengths = [_length(new), *lengths[:2]]
        error = math.sqrt(lengths[0] / total)
        if error <= tolerance:
            break
        p, rz = z.addcmul_(_ratio(new, rz), p), new
        if error * _gain(lengths) <= tolerance:
            return Solution(x.addcmul_(step, p), done, error * _gain(lengths))
    return Solution(x, done, error)


def _length(rz: Tensor) -> float:
    """The length ``rᵀz`` of a residual, all units together."""
    return max(float(rz.sum()), torch.finfo(rz.dtype).tiny)


def _gain(lengths: list[float]) -> float:
    """What a last step is expected to leave of the error.

    An iteration needs its product for the length of its step. Where a solve goes fast, the
    lengths vary little. So a last step along the next direction, as long as the one before,
    needs no product and serves nearly as well as an iteration. It is not verified: the error
    is expected to fall as in the slower one of the last two iterations, and a quarter less.

    Args:
        lengths: of the residuals of the last three iterations, the last one first.
    """
    slow = math.sqrt(max(lengths[0] / lengths[1], lengths[1] / lengths[2]))
    return MARGIN * slow if slow < FAST else 1.0


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and zero where b is not positive: there the solution is complete."""
    return torch.where(b > 0, a / b, 0.0)


def in_sample_space(
    features: Tensor,
    coefficients: Tensor,
    g: Tensor,
    damping: float,
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
    gram = features @ features.t()
    near = _Near(coefficients, gram, damping)
    r = g @ features.t()
    w = torch.zeros_like(r)
    p, along, rz = near.inverse(r)
    left = g.square().sum()  # ‖g‖² − wᵀUg
    tiny, lengths = torch.finfo(g.dtype).tiny, [_length(rz)] * 3
    done, error = 0, 1.0
    while done < max_iterations:
        done += 1
        product = (p @ gram).addcmul_(near.own, p)
        step = _ratio(rz, (p * product).sum(-1, keepdim=True))
        w.addcmul_(step, p)
        r.addcmul_(step, product, value=-1)
        left = left - (step * rz).sum()
        z, along, new = near.inverse(r)
        length, rest = torch.stack([new.sum(), left]).tolist()  # a device is waited for once
        lengths = [max(length, tiny), *lengths[:2]]
        gain = _gain(lengths)
        p, rz = z.addcmul_(_ratio(new, rz), p), new
        # The bound is at least √(rᵀz)/2, over a length of at most √left: most often not needed.
        if done == max_iterations or not gain**2 * length > 4 * tolerance**2 * rest:
            # ‖g − Uᵀw‖² = ‖g‖² − wᵀUg − wᵀ(αQ⁻¹)w, since wᵀr = 0
            inside = torch.dot((near.own * w).reshape(-1), w.reshape(-1))
            square = (left - inside).clamp(min=tiny)
            error = float((near.bound(r, along) / square).sqrt())
            if not error > tolerance:
                break
            if error * gain <= tolerance:
                w.addcmul_(step, p)
                error *= gain
                break
    factor = (1 + damping) / damping
    x = torch.addmm(g, w, features, beta=factor, alpha=-factor)
    return Solution(x, done, error)


class _Near:
    """``W_j⁻¹ + top topᵀ``, a diagonal and one, near to ``αQ_j⁻¹ + G``.

    Features that have a mean, as all binary ones have, give G one eigenvalue far above the
    others. Left to conjugate gradients, it comes back by rounding, larger by its ratio to the
    others in each iteration, and costs iterations (in float32 from the third on).

    Args:
        coefficients: Q, (n, units). gram: G, (n, n). damping: α > 0.

    Attributes:
        own: αQ⁻¹, (units, n).
    """

    def __init__(self, coefficients: Tensor, gram: Tensor, damping: float) -> None:
        limits = torch.finfo(gram.dtype)
        least = damping * limits.tiny**0.5  # as good as none; products with it are normal numbers
        q = coefficients.t().clamp(min=least).contiguous()
        share = q.sum(0)
        image = gram @ share
        top = image * torch.dot(image, share).clamp(min=limits.tiny).rsqrt()
        rest = (gram.diagonal() - top.square()).clamp(min=0)  # G − top topᵀ is positive
        self.own = damping / q
        self._q, self._top, self._damping = q, top, damping
        self._weight = (self.own + rest).reciprocal_()  # W
        self._turned = self._weight * top
        self._size = (self._turned @ top)[:, None]  # topᵀ W top
        self._shrink = self._size.add(1).reciprocal_()
        square = (q @ top.square())[:, None]
        self._reach = square.div_(square + damping)  # |a|² / (α + |a|²), see ``bound``

    def inverse(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``z = (W⁻¹ + top topᵀ)⁻¹ r``, (units, n), and ``topᵀWr`` and ``rᵀz``, (units, 1)."""
        z = self._weight * r
        along = (z @ self._top)[:, None]
        square = (z * r).sum(-1, keepdim=True)
        shrunk = along * self._shrink
        z.addcmul_(self._turned, shrunk, value=-1)
        return z, along, (square - along * shrunk).clamp_(min=0)

    def bound(self, r: Tensor, along: Tensor) -> Tensor:
        """A bound on ``‖Uᵀ(αQ⁻¹ + G)⁻¹ r‖²``, the error of x but for a factor, over all units.

        In the scale of ``V = Uᵀ√Q`` and ``B = αI + VᵀV`` the error is ``‖VB⁻¹√Q r‖``. With
        ``a = √Q top`` and ``√Q r = μa + s``: ``‖VB⁻¹s‖ ≤ ‖s‖ / 2√α``, and
        ``‖VB⁻¹a‖² ≤ |a|² / (α + |a|²)``, since B is at least ``αI + aaᵀ``. Most of the
        residual may stand along a, where it counts least.
        """
        mean = _ratio(along, self._size)
        rest = torch.addcmul(r, mean, self._top, value=-1)
        rest = (rest * self._q).mul_(rest).sum(-1, keepdim=True)
        error = rest.div_(4 * self._damping).sqrt_().addcmul_(mean.abs_(), self._reach.sqrt())
        return error.square_().sum()
