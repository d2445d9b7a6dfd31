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
CHOLESKY_SIZE = 48


@dataclass
class Solution:
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: relative residual, in the preconditioner's norm.
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
    r = (1 + damping) * g
    z = precondition(r)
    p, x = z, torch.zeros_like(g)
    rz = (r * z).sum(-1, keepdim=True)
    start = rz.clamp(min=torch.finfo(g.dtype).tiny)
    error, done = 1.0, 0
    while done < max_iterations:
        done += 1
        product = matvec(p) + damping * p
        curvature = (p * product).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        x = x + step * p
        r = r - step * product
        z = precondition(r)
        new = (r * z).sum(-1, keepdim=True)
        error = float((new.sum() / start.sum()).clamp(min=0).sqrt())
        if error <= tolerance:
            break
        ratio = torch.where(rz > 0, new / rz, torch.zeros_like(rz))
        p, rz = z + ratio * p, new
    return Solution(x, done, error)


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
    ``(αI + V_jᵀV_j) y_j = V_jᵀ g_j``. ``UUᵀ`` serves all units, so that a step of conjugate
    gradients costs units·n² instead of units·n·fan-in. No ``Q⁻¹``: idle rows do no harm.

    Args:
        features: U, (n, fan-in). coefficients: Q, (n, units). g: (units, fan-in).
        damping: α > 0. tolerance: bound on ``‖x − x*‖ / ‖x‖`` over all units together.
        max_iterations: at most so many products.
    """
    root = coefficients.t().sqrt()
    gram = features @ features.t()
    b = root * (g @ features.t())
    diagonal = damping + coefficients.t() * gram.diagonal()
    norm = g.square().sum()
    y, r = torch.zeros_like(b), b
    z = r / diagonal
    p, rz = z, (r * z).sum(-1, keepdim=True)
    done, error = 0, 1.0
    while done < max_iterations:
        done += 1
        product = damping * p + root * ((root * p) @ gram)
        curvature = (p * product).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        y, r = y + step * p, r - step * product
        # ‖V B⁻¹ r‖ ≤ ‖r‖ / 2√α, and ‖g − V y‖² = ‖g‖² − yᵀ(b + r) − α‖y‖²
        length = norm - (y * (b + r)).sum() - damping * y.square().sum()
        error = float((r.square().sum() / (4 * damping * length.clamp(min=1e-30))).sqrt())
        if error <= tolerance:
            break
        z = r / diagonal
        new = (r * z).sum(-1, keepdim=True)
        ratio = torch.where(rz > 0, new / rz, torch.zeros_like(rz))
        p, rz = z + ratio * p, new
    x = (g - (root * y) @ features) * ((1 + damping) / damping)
    return Solution(x, done, error)
