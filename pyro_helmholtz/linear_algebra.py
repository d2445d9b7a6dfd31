"""Solving with a symmetric positive-definite matrix, with the adjoint as its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Solve(torch.autograd.Function):
    """``X = G⁻¹B``. Backward: ``B̄ = G⁻¹X̄``, ``Ḡ = −B̄Xᵀ``; never through the factor."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if bool(info.any()):
            raise FloatingPointError(
                "the Gram matrix of the sleep samples is not positive definite or not finite. "
                "Give a larger ridge or a kernel that is positive definite; check that the "
                "model's dreams are finite."
            )
        solution = torch.cholesky_solve(right, factor)
        ctx.save_for_backward(factor, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor]:
        factor, solution = ctx.saved_tensors
        right = torch.cholesky_solve(grads[0], factor)
        return (-right @ solution.T if ctx.needs_input_grad[0] else None), right


def solve_spd(matrix: Tensor, right: Tensor) -> Tensor:
    """``G⁻¹B`` by one Cholesky factor.

    Args:
        matrix: G, (N, N), symmetric and positive definite. right: B, (N, M).

    Raises:
        FloatingPointError: a matrix that is not positive definite or not finite.
    """
    return _Solve.apply(matrix, right)  # type: ignore[no-untyped-call]
