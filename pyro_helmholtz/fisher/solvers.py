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
        """Of a symmetric mean block, (size, size).

        Computed in float64: in float32 the host's ``eigh`` can give NaN without an error for
        blocks of low rank, such as pixels that are always dark make them.
        """
        double = mean_block.cpu() if mean_block.device.type == "mps" else mean_block
        values, vectors = torch.linalg.eigh(double.double())
        return cls(values.clamp(min=0).to(mean_block), vectors.to(mean_block))

    def to(self, g: Tensor) -> Tensor:
        """(units, d·size) in the eigenbasis."""
        return (g.reshape(-1, self.values.numel()) @ self.vectors).reshape(g.shape)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of ``to``."""
        return (x.reshape(-1, self.values.numel()) @ self.vectors.t()).reshape(x.shape)

    def scaled_inverse(self, scales: Tensor, damping: float) -> Operator:
        """``P_j⁻¹`` on vectors that stand in the eigenbasis: no product with it is needed.

        Args:
            scales: (units,) or (units, d, d). damping: α > 0.
        """
        if scales.ndim == 1:
            inverse = 1 / (damping + scales[:, None] * self.values)
            return lambda g: g * inverse
        inner, w = torch.linalg.eigh(scales)
        units, d = inner.shape
        inverse = 1 / (damping + inner.clamp(min=0)[..., None] * self.values)

        def apply(g: Tensor) -> Tensor:
            inside = w.transpose(1, 2) @ g.reshape(units, d, -1)
            return (w @ (inside * inverse)).reshape(g.shape)

        return apply

    def inverse(self, g: Tensor, scales: Tensor, damping: float) -> Tensor:
        """``P_j⁻¹ g``, (units, d·size).

        Eigenvalues with ``max_j s_j λ < DROP·α`` change nothing and are left out where most
        are such: the cost falls from units·size² to units·size·kept.
        """
        keep = self.values.numel()
        if scales.ndim == 1:
            keep = int((self.values * scales.max() >= DROP * damping).sum())
        if 2 * keep >= self.values.numel():
            return self.back(self.scaled_inverse(scales, damping)(self.to(g)))
        first = self.values.numel() - keep
        v = self.vectors[:, first:]
        product = scales[:, None] * self.values[first:]
        return (g - ((g @ v) * (product / (damping + product))) @ v.t()) / damping
