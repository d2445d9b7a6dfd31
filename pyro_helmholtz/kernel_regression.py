"""Regressions on a kernel: in full, on random features, on inducing points (Nyström)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kernels import GaussianKernel, Kernel, spread
from .linear_algebra import solve_spd, whitened
from .options import check_counts
from .regression import DEFAULT_RIDGE, GradientModel, add_ridge, affine_basis, ridge_on_features


class _OnKernel(GradientModel):
    """A smoother with a kernel, the user's own or Gaussian."""

    def __init__(self, kernel: Kernel | None, ridge: float) -> None:
        super().__init__(ridge)
        if kernel is not None and not callable(kernel):
            raise TypeError(
                f"kernel must be callable, k(x, y) -> (n, m), got {type(kernel).__name__}."
            )
        self.kernel: Any = GaussianKernel() if kernel is None else kernel

    def prepare(self, x: Tensor) -> None:
        """See ``GradientModel.prepare``."""
        if hasattr(self.kernel, "prepare"):
            self.kernel.prepare(x)

    def parameters(self) -> dict[str, Tensor]:
        """See ``GradientModel.parameters``."""
        inner: Any = getattr(self.kernel, "parameters", dict)()
        if not isinstance(inner, dict):  # an nn.Module's
            inner = {f"kernel.{i}": leaf for i, leaf in enumerate(inner)}
        return {**super().parameters(), **inner}

    def state_dict(self) -> dict[str, Any]:
        """See ``GradientModel.state_dict``."""
        state = super().state_dict()
        if hasattr(self.kernel, "state_dict"):
            state["kernel"] = self.kernel.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GradientModel.load_state_dict``."""
        super().load_state_dict(state)
        if "kernel" in state:
            self.kernel.load_state_dict(state["kernel"])

    def describe(self) -> dict[str, Any]:
        """See ``GradientModel.describe``."""
        bandwidth = getattr(self.kernel, "bandwidth", math.nan)
        return {**super().describe(), "bandwidth": bandwidth}

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """``k(x, y)``, of the right shape.

        Raises:
            ValueError: a kernel that returns another shape.
        """
        matrix = self.kernel(x, y)
        if matrix.shape != (len(x), len(y)):
            raise ValueError(
                f"the kernel must map ({len(x)}, d) and ({len(y)}, d) to ({len(x)}, {len(y)}), "
                f"got shape {tuple(matrix.shape)}."
            )
        return matrix


class KernelRegression(_OnKernel):
    """Kernel ridge regression, ``A = (K + ΛI)⁻¹ K*``, by one Cholesky factor.

    With an affine part the prediction is ``β·[1, x]`` plus the kernel's, and β carries no ridge
    (universal kriging). With ``G = K + ΛI`` and the rows of B (N, d+1) being [1, x]::

        A = G⁻¹K* + G⁻¹B (BᵀG⁻¹B)⁺ (B*ᵀ − BᵀG⁻¹K*)

    Then ``Σ_n A_nm = 1``, and the prediction far from the sleep set is that of the linear
    regression and not 0 (covariate shift, Wenliang et al. 2020, section 3.5).

    Args:
        kernel: a ``GaussianKernel`` (the default) or any callable k(x, y) -> (n, m).
        ridge: Λ, the total ridge, see ``GradientModel``.
        affine: with the affine part. It costs nothing where the dreams cover the data. Far
            from them it is right for what is linear in x and wrong for squares, such as the
            gradient of a noise scale.
    """

    def __init__(
        self, kernel: Kernel | None = None, ridge: float = DEFAULT_RIDGE, affine: bool = False
    ) -> None:
        super().__init__(kernel, ridge)
        self.affine = bool(affine)

    def solve(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientModel.solve``."""
        if hasattr(self.kernel, "grams"):
            gram, cross = self.kernel.grams(x, targets)
        else:
            gram, cross = self.gram(x, x), self.gram(x, targets)
        gram = add_ridge(gram, self.log_ridge)
        if not self.affine:
            weights = solve_spd(gram, cross)
            return weights, weights.sum(0)
        if x.shape[1] + 1 >= len(x):
            raise ValueError(
                f"the affine part has {x.shape[1] + 1} columns and the sleep set {len(x)} "
                "samples: give more sleep samples or affine=False."
            )
        basis, at_targets = affine_basis(x, targets)
        both = solve_spd(gram, torch.cat([cross, basis], 1))
        weights, smooth = both[:, : len(targets)], both[:, len(targets) :]
        residual = at_targets.T - basis.T @ weights
        rtol = 1e-10 if x.dtype == torch.float64 else 1e-5
        inverse = torch.linalg.pinv(basis.T @ smooth, rtol=rtol, hermitian=True)
        return weights + smooth @ (inverse @ residual), weights.sum(0)

    def describe(self) -> dict[str, Any]:
        """See ``GradientModel.describe``."""
        return {**super().describe(), "affine": self.affine}


class RandomFeatures(_OnKernel):
    """Ridge regression on random Fourier features of a Gaussian kernel.

    ``f(x) = √(2/D) cos(φ(x)W/σ + b)`` with W ~ N(0, 1) and b ~ U(0, 2π), drawn at the first sleep
    set and then kept; ``A = F (FᵀF + ΛI)⁻¹ F*ᵀ`` (Rahimi and Recht 2007). It tends to the kernel
    regression as D grows, and costs N·D² instead of N³.

    Args:
        num_features: D. ridge: Λ, the total ridge, see ``GradientModel``.
        kernel: a ``GaussianKernel``.

    Raises:
        TypeError: another kernel. ValueError: ``num_features`` below 1.
    """

    def __init__(
        self,
        num_features: int = 1000,
        ridge: float = DEFAULT_RIDGE,
        kernel: GaussianKernel | None = None,
    ) -> None:
        super().__init__(kernel, ridge)
        if not isinstance(self.kernel, GaussianKernel):
            raise TypeError("random features are those of a GaussianKernel; give one as kernel=.")
        check_counts(num_features=num_features)
        self.num_features = num_features
        self.frequencies: Tensor | None = None
        self.phases: Tensor | None = None

    def prepare(self, x: Tensor) -> None:
        """See ``GradientModel.prepare``."""
        super().prepare(x)
        if self.frequencies is None:
            width = self.kernel.scaled(x[:2])[0].shape[1]
            self.frequencies = torch.randn(width, self.num_features).to(x)
            self.phases = 2 * math.pi * torch.rand(self.num_features).to(x)

    def solve(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientModel.solve``."""
        self.prepare(x)
        assert self.frequencies is not None
        scale = math.sqrt(2 / self.num_features)
        first, second = (
            scale * torch.cos(phi @ self.frequencies + self.phases)
            for phi in self.kernel.scaled(x, targets)
        )
        weights = ridge_on_features(first, second, self.log_ridge)
        return weights, weights.sum(0)

    def state_dict(self) -> dict[str, Any]:
        """See ``GradientModel.state_dict``."""
        return {**super().state_dict(), "random": (self.frequencies, self.phases)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GradientModel.load_state_dict``."""
        super().load_state_dict(state)
        self.frequencies, self.phases = state["random"]


class Nystrom(_OnKernel):
    """Nyström's form of the kernel regression, on m of the sleep samples (rows spread evenly).

    ``A = K_nm (K_mn K_nm + Λ K_mm)⁻¹ k_m*``; with m = N it is the kernel regression. It is solved
    as ``A = Φᵀ (ΦΦᵀ + ΛI)⁻¹ φ*`` on the features ``φ(x) = L⁻¹ k_m(x)``, ``LLᵀ = K_mm``, whose
    condition is the root of the other's.

    Args:
        num_inducing: m. ridge: Λ, the total ridge, see ``GradientModel``.
        kernel: a ``GaussianKernel`` (the default) or any callable k(x, y) -> (n, m).
    """

    def __init__(
        self, num_inducing: int = 200, ridge: float = DEFAULT_RIDGE, kernel: Kernel | None = None
    ) -> None:
        super().__init__(kernel, ridge)
        check_counts(num_inducing=num_inducing)
        self.num_inducing = num_inducing

    def solve(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientModel.solve``."""
        inducing = x[spread(min(self.num_inducing, len(x)), len(x), x.device)]
        rows = self.gram(inducing, torch.cat([inducing, x, targets]))
        m, n = len(inducing), len(x)
        features = whitened(rows[:, :m], rows[:, m:])
        first, second = features[:, :n], features[:, n:]
        ridge = self.log_ridge.exp().to(first)
        matrix = first @ first.T + ridge * torch.eye(m).to(first)
        weights = first.T @ solve_spd(matrix, second)
        return weights, weights.sum(0)
