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
DROP = 0.02


@dataclass
class Solution:
    """A solve's result.

    Attributes:
        x: (units, size). iterations: of conjugate gradients, 0 for a direct solve.
        error: largest relative residual, in the preconditioner's norm.
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
        tolerance: stop when every unit's residual, in the preconditioner's norm, is below
            this share of its start. max_iterations: at most so many products with F.
    """
    precondition = precondition or (lambda r: r / damping)
    r = (1 + damping) * g
    z = precondition(r)
    p, x = z, torch.zeros_like(g)
    rz = (r * z).sum(-1, keepdim=True)
    start = rz.clamp(min=torch.finfo(g.dtype).tiny)
    error, done = 1.0, 0
    for done in range(1, max_iterations + 1):
        product = matvec(p) + damping * p
        curvature = (p * product).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        x = x + step * p
        r = r - step * product
        z = precondition(r)
        new = (r * z).sum(-1, keepdim=True)
        error = float((new / start).max().clamp(min=0).sqrt())
        if error <= tolerance:
            break
        ratio = torch.where(rz > 0, new / rz, torch.zeros_like(rz))
        p, rz = z + ratio * p, new
    return Solution(x, done, error)


@dataclass
class EigenBasis:
    """The shared eigenbasis of a layer's mean block ``C = Uᵀ diag(q̄) U / Σ q̄``.

    ``P_j⁻¹ = V diag(1/(α + s_j λ)) Vᵀ`` with the unit's scale ``s_j = Σ_n Q_nj``; for coupled
    units ``s_j`` is a (d, d) matrix with an eigenbasis of its own.

    Attributes:
        values, vectors: (size,), (size, size) ascending.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, mean_block: Tensor) -> EigenBasis:
        values, vectors = torch.linalg.eigh(mean_block)
        return cls(values.clamp(min=0), vectors)

    def inverse(self, scales: Tensor, damping: float, drop: float = DROP) -> Operator:
        """The map ``g → P⁻¹ g`` on (units, size), or (units, d·size) for coupled units.

        Args:
            scales: (units,) or (units, d, d). damping: α > 0.
            drop: eigenvalues with ``max_j s_j λ < drop·α`` are left out: they change nothing.
        """
        if scales.ndim == 3:
            return self._coupled(scales, damping)
        largest = scales.max().clamp(min=0)
        keep = int((self.values * largest >= drop * damping).sum())
        keep_all = 2 * keep > self.values.numel()
        if keep_all:
            v, lam = self.vectors, self.values
            denominator = damping + scales[:, None] * lam
            return lambda g: ((g @ v) / denominator) @ v.t()
        first = self.values.numel() - keep
        v, lam = self.vectors[:, first:], self.values[first:]
        product = scales[:, None] * lam
        share = product / (damping + product)
        return lambda g: (g - ((g @ v) * share) @ v.t()) / damping

    def _coupled(self, scales: Tensor, damping: float) -> Operator:
        inner, w = torch.linalg.eigh(scales)
        v = self.vectors
        denominator = damping + inner.clamp(min=0)[..., None] * self.values
        units, d = inner.shape

        def apply(g: Tensor) -> Tensor:
            inside = w.transpose(1, 2) @ g.reshape(units, d, -1) @ v
            return (w @ (inside / denominator) @ v.t()).reshape(g.shape)

        return apply
