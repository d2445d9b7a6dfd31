"""What all regressions share: from observations to what the model's gradient needs.

A *gradient model* (Wenliang et al. 2020, sections 2.4 and 3.2, appendix B.1) is fitted to dreams
and applied to data. All but the particles are linear smoothers: the prediction for targets
``y`` (N,) is ``y @ A`` with weights ``A`` (N, M) that depend on the inputs alone. So one solve
serves every target and its derivative: ``∇_θ (y(θ) @ A) = ∇_θ y @ A``.

``ridge`` is always Λ, the **total** ridge that is added to the diagonal of the Gram matrix. It is
never multiplied by the number of samples. (The paper's text has Λ = λN; its settings are Λ.)

These objects hold options alone. What they draw or learn is a pytree γ from ``init``, the parts
``"learned"`` (what ``adapt`` moves) and ``"fixed"``.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from .kernels import deviation
from .linear_algebra import solve_spd

Gamma = dict[str, dict[str, Any]]
DEFAULT_RIDGE = 0.1  # Λ, the total ridge


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
        self.ridge = float(ridge)

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """γ from a first sleep set (N, d): ``{"learned": {...}, "fixed": {...}}``."""
        return {"learned": {"log_ridge": jnp.asarray(math.log(self.ridge), x.dtype)}, "fixed": {}}

    def _gamma(self, gamma: Gamma | None, x: Array) -> Gamma:
        return self.init(random.key(0), x) if gamma is None else gamma

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """The weights and their coverage.

        Args:
            x: inputs of the sleep set, (N, d). targets: inputs to predict at, (M, d).
            gamma: from ``init``; None is ``init``'s for this sleep set and a fixed key.

        Returns:
            A, (N, M), and the sums over N of the weights without the affine correction, (M,):
            near 1 where the sleep set covers the targets, near 0 far from it.
        """
        raise NotImplementedError

    def weights(self, x: Array, targets: Array, gamma: Gamma | None = None) -> Array:
        """A, (N, M): the prediction for targets y (N,) is ``y @ A``."""
        return self.solve(x, targets, gamma)[0]

    def describe(self, gamma: Gamma, x: Array) -> dict[str, Any]:
        """What the diagnostics report; -1 for a bandwidth that there is not."""
        ridge = jnp.exp(gamma["learned"]["log_ridge"])
        return {"bandwidth": jnp.full((), -1.0, x.dtype), "ridge": ridge, "affine": False}


def ridge_on_features(first: Array, second: Array, gamma: Gamma) -> Array:
    """``F (FᵀF + ΛI)⁻¹ F*ᵀ`` of features F (N, p) and F* (M, p)."""
    return first @ solve_spd(add_ridge(first.T @ first, gamma), second.T)


def ridge_of(gamma: Gamma, dtype: Any) -> Array:
    """Λ, which γ has by its logarithm."""
    return jnp.exp(gamma["learned"]["log_ridge"]).astype(dtype)


def add_ridge(matrix: Array, gamma: Gamma) -> Array:
    """``matrix + Λ I``."""
    ridge = ridge_of(gamma, matrix.dtype)
    return matrix + ridge * jnp.eye(len(matrix), dtype=matrix.dtype)


def affine_basis(x: Array, targets: Array) -> tuple[Array, Array]:
    """The rows [1, x] of both, with the columns standardised by those of ``x``."""
    mean, scale = x.mean(0), deviation(x)

    def rows(values: Array) -> Array:
        return jnp.concatenate([jnp.ones_like(values[:, :1]), (values - mean) / scale], 1)

    return rows(x), rows(targets)
