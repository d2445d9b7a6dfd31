"""Regressions on a kernel: in full, on random features, on inducing points (Nyström)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from .kernels import GaussianKernel, Kernel, spread
from .linear_algebra import solve_spd, whitened
from .options import check_counts
from .regression import (
    DEFAULT_RIDGE,
    Gamma,
    GradientModel,
    add_ridge,
    affine_basis,
    ridge_of,
    ridge_on_features,
)


class _OnKernel(GradientModel):
    """A smoother with a kernel, the user's own or Gaussian."""

    def __init__(self, kernel: Kernel | None, ridge: float) -> None:
        super().__init__(ridge)
        if kernel is not None and not callable(kernel):
            raise TypeError(
                f"kernel must be callable, k(x, y) -> (n, m), got {type(kernel).__name__}."
            )
        self.kernel: Any = GaussianKernel() if kernel is None else kernel

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """See ``GradientModel``."""
        gamma = super().init(rng_key, x)
        if hasattr(self.kernel, "init"):
            gamma["learned"]["kernel"] = self.kernel.init(rng_key, x)
        return gamma

    def describe(self, gamma: Gamma, x: Array) -> dict[str, Any]:
        """See ``GradientModel``."""
        found = super().describe(gamma, x)
        if isinstance(self.kernel, GaussianKernel):
            found["bandwidth"] = jnp.exp(gamma["learned"]["kernel"]["log_bandwidth"])
        return found

    def gram(self, x: Array, y: Array, gamma: Gamma) -> Array:
        """``k(x, y)``, of the right shape.

        Raises:
            ValueError: a kernel that returns another shape.
        """
        rest = (gamma["learned"]["kernel"],) if "kernel" in gamma["learned"] else ()
        matrix = self.kernel(x, y, *rest)
        if jnp.shape(matrix) != (len(x), len(y)):
            raise ValueError(
                f"the kernel must map ({len(x)}, d) and ({len(y)}, d) to ({len(x)}, {len(y)}), "
                f"got shape {jnp.shape(matrix)}."
            )
        return matrix

    def grams(self, x: Array, targets: Array, gamma: Gamma) -> tuple[Array, Array]:
        """``k(x, x)`` and ``k(x, targets)``."""
        if hasattr(self.kernel, "grams"):
            return self.kernel.grams(x, targets, gamma["learned"]["kernel"])
        return self.gram(x, x, gamma), self.gram(x, targets, gamma)


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
        affine: with the affine part.
    """

    def __init__(
        self, kernel: Kernel | None = None, ridge: float = DEFAULT_RIDGE, affine: bool = False
    ) -> None:
        super().__init__(kernel, ridge)
        self.affine = affine

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """See ``GradientModel``."""
        gamma = self._gamma(gamma, x)
        gram, cross = self.grams(x, targets, gamma)
        gram = add_ridge(gram, gamma)
        if not self.affine:
            weights = solve_spd(gram, cross)
            return weights, weights.sum(0)
        if x.shape[1] + 1 >= len(x):
            raise ValueError(
                f"the affine part has {x.shape[1] + 1} columns and the sleep set {len(x)} "
                "samples: give more sleep samples or affine=False."
            )
        basis, at_targets = affine_basis(x, targets)
        both = solve_spd(gram, jnp.concatenate([cross, basis], 1))
        weights, smooth = both[:, : len(targets)], both[:, len(targets) :]
        residual = at_targets.T - basis.T @ weights
        inverse = _pseudo_inverse(basis.T @ smooth)
        return weights + smooth @ (inverse @ residual), weights.sum(0)

    def describe(self, gamma: Gamma, x: Array) -> dict[str, Any]:
        """See ``GradientModel``."""
        return {**super().describe(gamma, x), "affine": self.affine}


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

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """See ``GradientModel``."""
        kernel_key, first, second = random.split(rng_key, 3)
        gamma = super().init(kernel_key, x)
        width = self.kernel.scaled(gamma["learned"]["kernel"], x[:2])[0].shape[1]
        gamma["fixed"] = {
            "frequencies": random.normal(first, (width, self.num_features), x.dtype),
            "phases": random.uniform(second, (self.num_features,), x.dtype, 0, 2 * math.pi),
        }
        return gamma

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """See ``GradientModel``."""
        gamma = self._gamma(gamma, x)
        scale = math.sqrt(2 / self.num_features)
        first, second = (
            scale * jnp.cos(phi @ gamma["fixed"]["frequencies"] + gamma["fixed"]["phases"])
            for phi in self.kernel.scaled(gamma["learned"]["kernel"], x, targets)
        )
        weights = ridge_on_features(first, second, gamma)
        return weights, weights.sum(0)


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

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """See ``GradientModel``."""
        gamma = self._gamma(gamma, x)
        inducing = x[spread(min(self.num_inducing, len(x)), len(x))]
        rows = self.gram(inducing, jnp.concatenate([inducing, x, targets]), gamma)
        m, n = len(inducing), len(x)
        features = whitened(rows[:, :m], rows[:, m:])
        first, second = features[:, :n], features[:, n:]
        matrix = first @ first.T + ridge_of(gamma, x.dtype) * jnp.eye(m, dtype=first.dtype)
        weights = first.T @ solve_spd(matrix, second)
        return weights, weights.sum(0)


@jax.custom_jvp
def _pseudo_inverse(matrix: Array) -> Array:
    """C⁺ of a symmetric positive semidefinite matrix."""
    rtol = 1e-10 if matrix.dtype == jnp.float64 else 1e-5
    values, vectors = jnp.linalg.eigh(matrix)
    keep = values > rtol * values.max()
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # At constant rank, along the range: no derivative of the eigenvectors, whose gaps may be 0.
    inverse = _pseudo_inverse(*primals)
    return inverse, -inverse @ tangents[0] @ inverse
