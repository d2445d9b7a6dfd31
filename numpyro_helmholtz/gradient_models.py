"""The gradient models of ALWS: by name, on a network, or by a simulator of the posterior.

The base of the regressions is in ``regression.py``, those on kernels in ``kernel_regression.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from .kernel_regression import KernelRegression, Nystrom, RandomFeatures
from .kernels import Kernel, is_module
from .options import check_counts
from .regression import DEFAULT_RIDGE, Gamma, GradientModel, affine_basis, ridge_on_features


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
        check_counts(num_features=num_features)
        self.num_features = num_features
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
            for rows in affine_basis(x, targets)
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
        check_counts(noise_dim=noise_dim, num_particles=num_particles)
        if num_particles % 2:
            raise ValueError(f"num_particles must be even, got {num_particles!r}.")
        self.simulator = simulator
        self.noise_dim, self.num_particles = noise_dim, num_particles

    def init(self, rng_key: Array, x: Array) -> Gamma:
        """γ from a first sleep set (N, d): the simulator's own parameters are learned."""
        noise = jnp.zeros((self.num_particles, len(x), self.noise_dim), x.dtype)
        return {"learned": self.simulator.init(rng_key, x, noise), "fixed": {}}


def _check_module(name: str, module: Any) -> None:
    if not is_module(module):
        raise TypeError(
            f"{name} must have init(rng_key, ...) and apply(params, ...), as flax.linen modules "
            f"have, got {type(module).__name__}."
        )


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
