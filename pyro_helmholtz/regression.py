"""What all regressions share: from observations to what the model's gradient needs.

A *gradient model* (Wenliang et al. 2020, sections 2.4 and 3.2, appendix B.1) is fitted to dreams
and applied to data. All but the particles are linear smoothers: the prediction for targets
``y`` (N,) is ``y @ A`` with weights ``A`` (N, M) that depend on the inputs alone. So one solve
serves every target and its derivative: ``∇_θ (y(θ) @ A) = ∇_θ y @ A``.

``ridge`` is always Λ, the **total** ridge that is added to the diagonal of the Gram matrix. It is
never multiplied by the number of samples. (The paper's text has Λ = λN; its settings are Λ.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kernels import deviation
from .linear_algebra import solve_spd

DEFAULT_RIDGE = 0.1


class GradientModel:
    """Base of the linear smoothers.

    Args:
        ridge: Λ, the total ridge: what is added to the diagonal, whatever the number of samples.

    Raises:
        ValueError: a ridge that is not positive and finite.
    """

    def __init__(self, ridge: float = DEFAULT_RIDGE) -> None:
        if not (isinstance(ridge, float | int) and ridge > 0 and math.isfinite(ridge)):
            raise ValueError(
                f"ridge must be positive and finite, got {ridge!r}. It is the total ridge: it is "
                "added to the diagonal of the Gram matrix as it is, never times the number of "
                "sleep samples."
            )
        self.log_ridge = torch.tensor(math.log(ridge), dtype=torch.float64, requires_grad=True)

    @property
    def ridge(self) -> float:
        """Λ, the total ridge."""
        return math.exp(self.log_ridge.item())

    def prepare(self, x: Tensor) -> None:
        """Set what the first sleep set (N, d) decides. Later calls change nothing."""

    def solve(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and their coverage.

        Args:
            x: inputs of the sleep set, (N, d). targets: inputs to predict at, (M, d).

        Returns:
            A, (N, M), and the sums over N of the weights without the affine correction, (M,):
            near 1 where the sleep set covers the targets, near 0 far from it.
        """
        raise NotImplementedError

    def weights(self, x: Tensor, targets: Tensor) -> Tensor:
        """A, (N, M): the prediction for targets y (N,) is ``y @ A``."""
        return self.solve(x, targets)[0]

    def parameters(self) -> dict[str, Tensor]:
        """What can be adapted, by name."""
        return {"log_ridge": self.log_ridge}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next solve depends on."""
        return {"log_ridge": self.log_ridge.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        with torch.no_grad():
            self.log_ridge.fill_(state["log_ridge"])

    def describe(self) -> dict[str, Any]:
        """What the diagnostics report."""
        return {"bandwidth": math.nan, "ridge": self.ridge, "affine": False}


def ridge_on_features(first: Tensor, second: Tensor, log_ridge: Tensor) -> Tensor:
    """``F (FᵀF + ΛI)⁻¹ F*ᵀ`` of features F (N, p) and F* (M, p)."""
    return first @ solve_spd(add_ridge(first.T @ first, log_ridge), second.T)


def add_ridge(matrix: Tensor, log_ridge: Tensor) -> Tensor:
    """``matrix + Λ I``."""
    ridge = log_ridge.exp().to(matrix.device, matrix.dtype)
    return matrix + torch.diag_embed(ridge.expand(len(matrix)))


def affine_basis(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [1, x] of both, with the columns standardised by those of ``x``."""
    mean, scale = x.mean(0), deviation(x)

    def rows(values: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(values[:, :1]), (values - mean) / scale], 1)

    return rows(x), rows(targets)
