"""Regressions from observations to what the model's gradient needs.

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from .kernels import GaussianKernel, Kernel, deviation, is_module, spread
from .linear_algebra import solve_spd, whitened

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
        gram = _add_ridge(gram, gamma)
        if not self.affine:
            weights = solve_spd(gram, cross)
            return weights, weights.sum(0)
        if x.shape[1] + 1 >= len(x):
            raise ValueError(
                f"the affine part has {x.shape[1] + 1} columns and the sleep set {len(x)} "
                "samples: give more sleep samples or affine=False."
            )
        basis, at_targets = _affine_basis(x, targets)
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
        self.num_features = _count("num_features", num_features)

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
        self.num_inducing = _count("num_inducing", num_inducing)

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """See ``GradientModel``."""
        gamma = self._gamma(gamma, x)
        inducing = x[spread(min(self.num_inducing, len(x)), len(x))]
        rows = self.gram(inducing, jnp.concatenate([inducing, x, targets]), gamma)
        m, n = len(inducing), len(x)
        features = whitened(rows[:, :m], rows[:, m:])
        first, second = features[:, :n], features[:, n:]
        matrix = first @ first.T + _ridge(gamma, x.dtype) * jnp.eye(m, dtype=first.dtype)
        weights = first.T @ solve_spd(matrix, second)
        return weights, weights.sum(0)


class NetworkRegression(GradientModel):
    """Ridge regression on the features of a network that is trained on the regression error.

    The last layer is solved exactly: with features ``f`` and ``F`` (N, p+1) the rows [1, f(x)],
    ``A = F (FᵀF + ΛI)⁻¹ F*ᵀ``. So the derivative in θ at fixed features is exact, which for a
    network trained throughout takes an unstable inverse Hessian (Wenliang et al. 2020, B.1.1).
    The inputs are standardised by the sleep set. The network is always trained, by ``adapt``.

    Args:
        network: an object with ``init(rng_key, x) -> params`` and ``apply(params, x)``, such as
            a flax.linen module, (N, d) -> (N, p). None: one hidden layer of tanh units.
        ridge: Λ, the total ridge, see ``GradientModel``.
        num_features: p of the default network.
    """

    def __init__(
        self, network: Any = None, ridge: float = DEFAULT_RIDGE, num_features: int = 100
    ) -> None:
        super().__init__(ridge)
        self.num_features = _count("num_features", num_features)
        self.network = _Tanh(num_features) if network is None else network
        _check_module("network", self.network)

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """See ``GradientModel``."""
        gamma = super().init(rng_key, x)
        gamma["learned"]["network"] = self.network.init(rng_key, x)
        return gamma

    def solve(self, x: Array, targets: Array, gamma: Gamma | None = None) -> tuple[Array, Array]:
        """See ``GradientModel``."""
        gamma = self._gamma(gamma, x)
        network = gamma["learned"]["network"]
        first, second = (
            jnp.concatenate([rows[:, :1], self.network.apply(network, rows[:, 1:])], 1)
            for rows in _affine_basis(x, targets)
        )
        weights = ridge_on_features(first, second, gamma)
        return weights, weights.sum(0)


class _Tanh:
    """One layer of tanh units."""

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features

    def init(self, rng_key: Array, x: Array) -> dict[str, Array]:
        bound = 1 / math.sqrt(x.shape[1])
        first, second = random.split(rng_key)
        shape = (x.shape[1], self.num_features)
        return {
            "weight": random.uniform(first, shape, x.dtype, -bound, bound),
            "bias": random.uniform(second, shape[1:], x.dtype, -bound, bound),
        }

    def apply(self, params: dict[str, Array], x: Array) -> Array:
        return jnp.tanh(x @ params["weight"] + params["bias"])


class DirectRegression:
    """Regression of the per-sample gradients ``∇_θ log p(z_n, x_n)`` themselves, eq. (10).

    One vector-valued target per parameter; with the same weights it gives what differentiating
    the regression of ``log p`` gives, to round-off, at far higher cost. A reference.

    Args:
        regression: the linear smoother; a ``KernelRegression`` by default.
    """

    def __init__(self, regression: GradientModel | None = None) -> None:
        self.regression = KernelRegression() if regression is None else regression


class ParticleSimulator:
    """Particles from a simulator of latents, trained on the gradient's error (appendix B.1.2).

    ``Δ̂(x) = mean_r ∇_θ log p(S_γ(x, noise_r), x)``, where γ minimises the mean over dreams of
    ``|Δ̂(x_n) − ∇_θ log p(z_n, x_n)|²``. The particles are split in two halves and the square is
    the inner product of the two errors, which is free of the Monte-Carlo variance.

    Args:
        simulator: an object with ``init(rng_key, x, noise) -> γ`` and ``apply(γ, x, noise)``,
            such as a flax.linen module; x (n, d), noise (R, n, noise_dim) ->
            {latent site: (R, n, *event)}, differentiable in γ.
        noise_dim: of the standard normal noise. num_particles: R, even and at least 2.

    Raises:
        TypeError: a simulator that is no such object. ValueError: a count out of range.
    """

    def __init__(self, simulator: Any, noise_dim: int, num_particles: int = 10) -> None:
        _check_module("simulator", simulator)
        if num_particles % 2:
            raise ValueError(f"num_particles must be even, got {num_particles!r}.")
        self.simulator = simulator
        self.noise_dim = _count("noise_dim", noise_dim)
        self.num_particles = _count("num_particles", num_particles)

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """γ from a first sleep set (N, d): the simulator's own parameters are learned."""
        noise = jnp.zeros((self.num_particles, len(x), self.noise_dim), x.dtype)
        return {"learned": self.simulator.init(rng_key, x, noise), "fixed": {}}


def ridge_on_features(first: Array, second: Array, gamma: Gamma) -> Array:
    """``F (FᵀF + ΛI)⁻¹ F*ᵀ`` of features F (N, p) and F* (M, p)."""
    return first @ solve_spd(_add_ridge(first.T @ first, gamma), second.T)


def _ridge(gamma: Gamma, dtype: Any) -> Array:
    return jnp.exp(gamma["learned"]["log_ridge"]).astype(dtype)


def _add_ridge(matrix: Array, gamma: Gamma) -> Array:
    ridge = _ridge(gamma, matrix.dtype)
    return matrix + ridge * jnp.eye(len(matrix), dtype=matrix.dtype)


def _affine_basis(x: Array, targets: Array) -> tuple[Array, Array]:
    """The rows [1, x] of both, with the columns standardised by those of ``x``."""
    mean, scale = x.mean(0), deviation(x)

    def rows(values: Array) -> Array:
        return jnp.concatenate([jnp.ones_like(values[:, :1]), (values - mean) / scale], 1)

    return rows(x), rows(targets)


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


def _check_module(name: str, module: Any) -> None:
    if not is_module(module):
        raise TypeError(
            f"{name} must have init(rng_key, ...) and apply(params, ...), as flax.linen modules "
            f"have, got {type(module).__name__}."
        )


def _count(name: str, value: int) -> int:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
    return value


_BY_NAME: dict[str, Callable[[Any, float, bool], Any]] = {
    "kernel": lambda kernel, ridge, affine: KernelRegression(kernel, ridge, affine),
    "random-features": lambda kernel, ridge, affine: RandomFeatures(1000, ridge, kernel),
    "nystrom": lambda kernel, ridge, affine: Nystrom(200, ridge, kernel),
    "network": lambda kernel, ridge, affine: NetworkRegression(None, ridge),
    "direct": lambda kernel, ridge, affine: DirectRegression(
        KernelRegression(kernel, ridge, affine)
    ),
}


def make_gradient_model(choice: Any, *, ridge: float, kernel: Kernel | None, affine: bool) -> Any:
    """A gradient model from its name; an object is returned as it is.

    Raises:
        ValueError: an unknown name, or an option that this gradient model does not use.
        TypeError: an object without ``weights(x, targets)``.
    """
    if isinstance(choice, str):
        if choice not in _BY_NAME:
            raise ValueError(f"gradient_model must be one of {sorted(_BY_NAME)}, got {choice!r}.")
        if affine and choice not in ("kernel", "direct"):
            raise ValueError(f"gradient_model {choice!r} has no affine part; leave affine out.")
        if kernel is not None and choice == "network":
            raise ValueError("gradient_model 'network' has no kernel; leave kernel out.")
        return _BY_NAME[choice](kernel, ridge, affine)
    if kernel is not None or affine or ridge != DEFAULT_RIDGE:
        raise ValueError(
            "ridge, kernel and affine belong to a gradient model that is given by name. Give them "
            f"to the {type(choice).__name__} itself."
        )
    known = isinstance(choice, DirectRegression | ParticleSimulator)
    if not known and not callable(getattr(choice, "weights", None)):
        raise TypeError(
            f"gradient_model must be one of {sorted(_BY_NAME)} or an object with "
            f"weights(x, targets) -> (N, M), got {type(choice).__name__}."
        )
    return choice


__all__ = [
    "DirectRegression",
    "GradientModel",
    "KernelRegression",
    "NetworkRegression",
    "Nystrom",
    "ParticleSimulator",
    "RandomFeatures",
]
