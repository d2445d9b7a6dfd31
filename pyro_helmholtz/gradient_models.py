"""Regressions from observations to what the model's gradient needs.

A *gradient model* (Wenliang et al. 2020, sections 2.4 and 3.2, appendix B.1) is fitted to dreams
and applied to data. All but the particles are linear smoothers: the prediction for targets
``y`` (N,) is ``y @ A`` with weights ``A`` (N, M) that depend on the inputs alone. So one solve
serves every target and its derivative: ``∇_θ (y(θ) @ A) = ∇_θ y @ A``.

``ridge`` is always Λ, the **total** ridge that is added to the diagonal of the Gram matrix. It is
never multiplied by the number of samples. (The paper's text has Λ = λN; its settings are Λ.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import GaussianKernel, Kernel, deviation, spread
from .linear_algebra import solve_spd, whitened

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
        gram = _add_ridge(gram, self.log_ridge)
        if not self.affine:
            weights = solve_spd(gram, cross)
            return weights, weights.sum(0)
        if x.shape[1] + 1 >= len(x):
            raise ValueError(
                f"the affine part has {x.shape[1] + 1} columns and the sleep set {len(x)} "
                "samples: give more sleep samples or affine=False."
            )
        basis, at_targets = _affine_basis(x, targets)
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
        self.num_features = _count("num_features", num_features)
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
        self.num_inducing = _count("num_inducing", num_inducing)

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
        self.num_features = _count("num_features", num_features)

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
        _, first = _affine_basis(x, x)
        _, second = _affine_basis(x, targets)
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


def ridge_on_features(first: Tensor, second: Tensor, log_ridge: Tensor) -> Tensor:
    """``F (FᵀF + ΛI)⁻¹ F*ᵀ`` of features F (N, p) and F* (M, p)."""
    return first @ solve_spd(_add_ridge(first.T @ first, log_ridge), second.T)


def _add_ridge(matrix: Tensor, log_ridge: Tensor) -> Tensor:
    ridge = log_ridge.exp().to(matrix.device, matrix.dtype)
    return matrix + torch.diag_embed(ridge.expand(len(matrix)))


def _affine_basis(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [1, x] of both, with the columns standardised by those of ``x``."""
    mean, scale = x.mean(0), deviation(x)

    def rows(values: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(values[:, :1]), (values - mean) / scale], 1)

    return rows(x), rows(targets)


def _count(name: str, value: int) -> int:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
    return value


Simulator = Callable[[Tensor, Tensor], dict[str, Tensor]]


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
        if num_particles % 2:
            raise ValueError(f"num_particles must be even, got {num_particles!r}.")
        self.simulator = simulator
        self.noise_dim = _count("noise_dim", noise_dim)
        self.num_particles = _count("num_particles", num_particles)

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
