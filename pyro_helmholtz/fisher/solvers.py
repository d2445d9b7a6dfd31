"""Solve ``(αI + F_j) x_j = (1+α) g_j`` for all units of a block at once.

Renormalised Tikhonov damping: α → ∞ gives the gradient back, α → 0 the natural gradient
(Várady 2025, section 5.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
CHOLESKY_SIZE = 24
NEAR = 2  # a closer bound on the error is looked at below so many tolerances


@dataclass
class Solution:
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm; in the space of the samples a
            bound on the relative error of x.
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
    start = rz.clamp(min=torch.finfo(g.dtype).tiny)
    error, done = 1.0, 0
    while done < max_iterations:
        done += 1
        product = matvec(p).add_(p, alpha=damping)
        step = _ratio(rz, (p * product).sum(-1, keepdim=True))
        x.addcmul_(step, p)
        r.addcmul_(step, product, value=-1)
        z = precondition(r)
        new = (r * z).sum(-1, keepdim=True)
        error = float((new.sum() / start.sum()).clamp(min=0).sqrt())
        if error <= tolerance:
            break
        p, rz = z.addcmul_(_ratio(new, rz), p), new
    return Solution(x, done, error)


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

    With ``V_j = Uᵀ diag(√Q_j)`` the solution is ``x_j = (1+α)/α (g_j − V_j y_j)``, where
    ``B_j y_j = V_jᵀ g_j`` and ``B_j = αI + V_jᵀV_j``. ``UUᵀ`` serves all units, so that a step
    of conjugate gradients costs units·n² instead of units·n·fan-in. No ``Q⁻¹``: idle rows do no
    harm. With the residual r the error of x is ``‖V B⁻¹ r‖``, of which there are two bounds: a
    simple one, and a closer one, dearer, where the simple one comes near to the tolerance.

    Args:
        features: U, (n, fan-in). coefficients: Q, (n, units). g: (units, fan-in).
        damping: α > 0. tolerance: bound on ``‖x − x*‖ / ‖x‖`` over all units together.
        max_iterations: at most so many products.
    """
    root = coefficients.sqrt().t().contiguous()
    gram = features @ features.t()
    near = _DiagonalAndOne(root, gram, coefficients.sum(1), damping)
    r = (g @ features.t()).mul_(root)  # at first b = V_jᵀ g_j
    norm = g.square().sum()
    y = torch.zeros_like(r)
    p = near.inverse(r, near.along(r))
    rz = (r * p).sum(-1, keepdim=True)
    overlap = torch.zeros_like(norm)  # yᵀb
    done, error = 0, 1.0
    while done < max_iterations:
        done += 1
        product = ((root * p) @ gram).mul_(root).add_(p, alpha=damping)
        step = _ratio(rz, (p * product).sum(-1, keepdim=True))
        y.addcmul_(step, p)
        r.addcmul_(step, product, value=-1)
        # ‖V B⁻¹ r‖ ≤ ‖r‖ / 2√α, and ‖g − V y‖² = ‖g‖² − yᵀb − α‖y‖², since yᵀr = 0
        overlap = overlap + (step * rz).sum()
        length = (norm - overlap - damping * _dot(y, y)).clamp(min=1e-30)
        error = float((_dot(r, r) / (4 * damping * length)).sqrt())
        if error <= tolerance:
            break
        along = near.along(r)
        if error <= NEAR * tolerance:
            error = min(error, float((near.bound(r, along) / length).sqrt()))
            if error <= tolerance:
                break
        z = near.inverse(r, along)
        new = (r * z).sum(-1, keepdim=True)
        p, rz = z.addcmul_(_ratio(new, rz), p), new
    factor = (1 + damping) / damping
    x = torch.addmm(g, y.mul_(root), features, beta=factor, alpha=-factor)
    return Solution(x, done, error)


class _DiagonalAndOne:
    """``diag + a aᵀ`` for each unit, near to ``B = αI + diag(√Q) G diag(√Q)``.

    Features that have a mean, as all binary ones have, give G one eigenvalue far above the
    others. Left to conjugate gradients, it comes back by rounding, larger by its ratio to the
    others in each iteration, and costs iterations (in float32 from the third on).

    Args:
        root: √Q, (units, n). gram: G, (n, n). share: of the rows, (n,). damping: α > 0.
    """

    def __init__(self, root: Tensor, gram: Tensor, share: Tensor, damping: float) -> None:
        self._damping = damping
        image = gram @ share
        top = image * torch.dot(image, share).clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
        rest = (gram.diagonal() - top.square()).clamp(min=0)  # G − top topᵀ is positive
        self._inverse = root.square().mul_(rest).add_(damping).reciprocal_()
        self._one = root * top  # a
        self._turned = self._one * self._inverse
        self._across = (self._one * self._turned).sum(-1, keepdim=True)
        self._shrink = self._across.add(1).reciprocal_().neg_()

    def along(self, r: Tensor) -> Tensor:
        """``aᵀ diag⁻¹ r``, (units, 1)."""
        return (self._turned * r).sum(-1, keepdim=True)

    def inverse(self, r: Tensor, along: Tensor) -> Tensor:
        """``(diag + a aᵀ)⁻¹ r``, (units, n)."""
        return (r * self._inverse).addcmul_(self._turned, along * self._shrink)

    def bound(self, r: Tensor, along: Tensor) -> Tensor:
        """A bound on ``‖V B⁻¹ r‖²``, summed over the units.

        With ``r = μa + s``: ``‖V B⁻¹ s‖ ≤ ‖s‖ / 2√α``, and ``‖V B⁻¹ a‖² ≤ |a|² / (α + |a|²)``,
        since B is at least ``αI + aaᵀ``. Most of the residual may stand along a, where it
        counts least.
        """
        mean = _ratio(along, self._across)
        rest = torch.addcmul(r, self._one, mean, value=-1).square_().sum(-1, keepdim=True)
        square = self._one.square().sum(-1, keepdim=True)
        reach = (square / (square + self._damping)).sqrt_()
        bound = rest.div_(4 * self._damping).sqrt_().addcmul_(mean.abs_(), reach)
        return bound.square_().sum()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
