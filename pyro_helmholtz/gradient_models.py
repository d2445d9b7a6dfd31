"""The gradient models of ALWS: by name, on a network, or by a simulator of the posterior.

The base of the regressions is in ``regression.py``, those on kernels in ``kernel_regression.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_regression import KernelRegression, Nystrom, RandomFeatures
from .kernels import Kernel
from .options import check_counts
from .regression import DEFAULT_RIDGE, GradientModel, affine_basis, ridge_on_features

Simulator = Callable[[Tensor, Tensor], dict[str, Tensor]]


class NetworkRegression(GradientModel):
    """Ridge regression on the features of a network that is trained on the regression error.

    The last layer is solved exactly: with features ``f`` and ``F`` (N, p+1) the rows [1, f(x)],
    ``A = F (FᵀF + ΛI)⁻¹ F*ᵀ``. So the derivative in θ at fixed features is exact, which for a
    network trained throughout takes an unstable inverse Hessian (Wenliang et al. 2020, B.1.1).
    The inputs are standardised by the sleep set. The network is always trained, by ``adapt``.

    Args:
        network: an ``nn.Module`` (N, d) -> (N, p). None: one hidden layer of tanh units.
        ridge: Λ, the total ridge, see ``GradientModel``.
        num_features: p of the default network.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        ridge: float = DEFAULT_RIDGE,
        num_features: int = 100,
    ) -> None:
        super().__init__(ridge)
        if network is not None and not isinstance(network, nn.Module):
            raise TypeError(f"network must be an nn.Module, got {type(network).__name__}.")
        self.network = network
        check_counts(num_features=num_features)
        self.num_features = num_features

    def _make(self, inputs: int, like: Tensor) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, self.num_features), nn.Tanh()).to(like)

    def prepare(self, x: Tensor) -> None:
        """See ``GradientModel.prepare``."""
        if self.network is None:
            self.network = self._make(x.shape[1], x)

    def solve(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientModel.solve``."""
        self.prepare(x)
        assert self.network is not None
        _, first = affine_basis(x, x)
        _, second = affine_basis(x, targets)
        ones = first[:, :1], second[:, :1]
        first = torch.cat([ones[0], self.network(first[:, 1:])], 1)
        second = torch.cat([ones[1], self.network(second[:, 1:])], 1)
        weights = ridge_on_features(first, second, self.log_ridge)
        return weights, weights.sum(0)

    def parameters(self) -> dict[str, Tensor]:
        """See ``GradientModel.parameters``."""
        network = {} if self.network is None else dict(self.network.named_parameters())
        leaves = {f"network.{name}": leaf for name, leaf in network.items()}
        return {**super().parameters(), **leaves}

    def state_dict(self) -> dict[str, Any]:
        """See ``GradientModel.state_dict``."""
        state = super().state_dict()
        if self.network is not None:
            state["network"] = {k: v.clone() for k, v in self.network.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GradientModel.load_state_dict``."""
        super().load_state_dict(state)
        if "network" not in state:
            return
        if self.network is None:
            weight = state["network"]["0.weight"]
            self.network = self._make(weight.shape[1], weight)
        self.network.load_state_dict(state["network"])


class DirectRegression:
    """Regression of the per-sample gradients ``∇_θ log p(z_n, x_n)`` themselves, eq. (10).

    One vector-valued target per parameter; with the same weights it gives what differentiating
    the regression of ``log p`` gives, to round-off, at far higher cost. A reference.

    Args:
        regression: the linear smoother; a ``KernelRegression`` by default.
    """

    def __init__(self, regression: GradientModel | None = None) -> None:
        self.regression = KernelRegression() if regression is None else regression

    def state_dict(self) -> dict[str, Any]:
        """See ``GradientModel.state_dict``."""
        return self.regression.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GradientModel.load_state_dict``."""
        self.regression.load_state_dict(state)


class ParticleSimulator:
    """Particles from a simulator of latents, trained on the gradient's error (appendix B.1.2).

    ``Δ̂(x) = mean_r ∇_θ log p(S_γ(x, noise_r), x)``, where γ minimises the mean over dreams of
    ``|Δ̂(x_n) − ∇_θ log p(z_n, x_n)|²``. The particles are split in two halves and the square is
    the inner product of the two errors, which is free of the Monte-Carlo variance.

    Args:
        simulator: an ``nn.Module``, ``S(x (n, d), noise (R, n, noise_dim))`` to a dictionary
            from latent sites to values (R, n, *event), differentiable in its parameters.
        noise_dim: of the standard normal noise.
        num_particles: R, even and at least 2.

    Raises:
        TypeError: a simulator that is no ``nn.Module``. ValueError: a count out of range.
    """

    def __init__(self, simulator: nn.Module, noise_dim: int, num_particles: int = 10) -> None:
        if not isinstance(simulator, nn.Module):
            raise TypeError(f"simulator must be an nn.Module, got {type(simulator).__name__}.")
        check_counts(noise_dim=noise_dim, num_particles=num_particles)
        if num_particles % 2:
            raise ValueError(f"num_particles must be even, got {num_particles!r}.")
        self.simulator = simulator
        self.noise_dim, self.num_particles = noise_dim, num_particles

    def particles(self, x: Tensor) -> dict[str, Tensor]:
        """Latents (R, n, *event) for the inputs (n, d)."""
        shape = (self.num_particles, len(x), self.noise_dim)
        return self.simulator(x, torch.randn(shape, device=x.device).to(x))

    def parameters(self) -> dict[str, Tensor]:
        """The simulator's parameters by name."""
        return {f"simulator.{n}": leaf for n, leaf in self.simulator.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """The simulator's state."""
        return {k: v.clone() for k, v in self.simulator.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.simulator.load_state_dict(state)


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
