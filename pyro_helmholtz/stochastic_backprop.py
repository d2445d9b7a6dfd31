"""The front end ``StochasticBackprop``, with variational Bayes over the model's parameters.

Rezende, Mohamed and Wierstra 2014; the parameters' posterior is appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.optim import PyroOptim
from torch import Tensor

from .estimators.reparameterised import StochasticBackprop_ELBO
from .sites import parameters
from .svi import Directions, HelmholtzSVI, check_gradients, gradient
from .trace import Wake

__all__ = ["StochasticBackprop"]

DEFAULT_RATE = 1e-3
VARIANCE = "posterior_variance."


class StochasticBackprop(HelmholtzSVI):
    """Train reparameterised latents, and if asked a Gaussian posterior of the model's parameters.

    With ``parameter_posterior=κ`` every parameter θ_j of the model, in its unconstrained space,
    has the prior N(0, κ) and the posterior N(m_j, τ_j). The means m are the program's own
    parameters. The objective is ``E[ELBO(θ)] − Σ_j KL_j`` (equation 45)::

        KL_j = ½ (m_j²/κ + τ_j/κ + log κ − log τ_j − 1)
        ascent in m_j:     mean_b ∂log p/∂θ_j − m_j/(κ N)
        ascent in log τ_j: ½ √τ_j ε_j mean_b ∂log p/∂θ_j + (1 − τ_j/κ)/(2N),  θ = m + √τ ε

    where N is the number of data: the data's terms carry the scale of a subsample, the KL does
    not. (Equation 46 lacks the κ.) During an update the drawn values stand in the parameters
    themselves, whatever module or ``pyro.param`` reads them, and the means come back after it.

    Args:
        model, guide: see ``HelmholtzSVI``; all latents need reparameterised samplers.
        optim: any ``pyro.optim`` optimiser; None is Adam of rate 0.001.
        num_particles, estimator, entropy, hessian, num_probes, max_plate_nesting: see
            ``StochasticBackprop_ELBO``.
        parameter_posterior: the prior's variance κ > 0; None trains point estimates.
        parameter_variance: τ at the start, above 0.
        parameter_draws: "step" draws θ once for all data and particles of an update;
            "particle" once for each particle, which then run one after the other.
        average: see ``HelmholtzSVI``. The m and log τ of a posterior have means likewise.

    Raises:
        TypeError: an optimiser that is not Pyro's.
        ValueError: an option out of its range.
    """

    estimator: StochasticBackprop_ELBO

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | None = None,
        num_particles: int = 1,
        *,
        estimator: str = "path",
        parameter_posterior: float | None = None,
        parameter_variance: float = 1e-6,
        parameter_draws: str = "step",
        average: bool = False,
        **options: Any,
    ) -> None:
        for name, value in (
            ("parameter_posterior", parameter_posterior),
            ("parameter_variance", parameter_variance),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if parameter_draws not in ("step", "particle"):
            raise ValueError(
                f"parameter_draws must be 'step' or 'particle', got {parameter_draws!r}."
            )
        runs = num_particles if parameter_posterior and parameter_draws == "particle" else 1
        elbo = StochasticBackprop_ELBO(num_particles, estimator=estimator, **options)
        super().__init__(model, guide, optim, elbo, average=average)
        self.parameter_posterior, self.parameter_variance = parameter_posterior, parameter_variance
        self._runs, self._one = runs, elbo
        if runs > 1:  # each draw of the parameters has one particle
            self._one = StochasticBackprop_ELBO(1, estimator=estimator, **options)
        self._random: list[str] = []  # names of the parameters that have a posterior

    def default_optimiser(self) -> PyroOptim:
        """Adam of rate 0.001."""
        return pyro.optim.Adam({"lr": DEFAULT_RATE})  # type: ignore[attr-defined]

    def structure(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """For each latent site, how its gradient and its entropy are found; updates nothing."""
        self._resume(args, kwargs)
        with torch.no_grad():
            wake = self.programs.wake(args, kwargs)
            self.estimator.bound(wake)
        return self.estimator.describe(wake)

    def posterior(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and variance of each model parameter, in its unconstrained space.

        Raises:
            ValueError: without ``parameter_posterior``, or before the first step.
        """
        if self.parameter_posterior is None or not self._random:
            why = "no step was taken yet" if self.parameter_posterior else "it was not asked for"
            raise ValueError(f"there is no posterior of the parameters: {why}.")
        leaves = pyro.get_param_store()._params
        return {
            name: (leaves[name].detach().clone(), leaves[VARIANCE + name].detach().exp())
            for name in self._random
        }

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO on the host's scale, at the parameters' means, plus their KL."""
        loss = super().evaluate_loss(*args, **kwargs)
        if self.parameter_posterior is None:
            return loss
        self._find(args, kwargs)
        return loss + float(self._divergence())

    def directions(self, *args: Any, **kwargs: Any) -> Directions:
        """The directions that a step would take on these data; updates nothing.

        With a posterior they include those of ``log τ``, as "posterior_variance." and the name.
        """
        check_gradients()
        self._resume(args, kwargs)
        with self._points():
            loss, _, direction = self._update(args, kwargs)
        return Directions(direction, direction, None, loss)

    def _update(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        if self.parameter_posterior is None:
            return super()._update(args, kwargs)
        self._find(args, kwargs)
        store = pyro.get_param_store()._params
        means = {name: store[name] for name in self._random}
        logs = {name: store[VARIANCE + name] for name in self._random}
        loss = 0.0
        direction: dict[str, Any] = {}
        for _ in range(self._runs):
            noise = {name: torch.randn_like(mean) for name, mean in means.items()}
            shift = {name: (0.5 * logs[name]).exp() * noise[name] for name in means}
            with _moved(means, shift):
                done = self._one.run(self._one.programs(self.model, self.guide), args, kwargs)
                leaves = done.leaves() | means  # this run may have left some unread
                slopes = gradient(done.surrogate, leaves)
            for name in means:
                slopes[VARIANCE + name] = 0.5 * shift[name].detach() * slopes[name]
            for name, slope in slopes.items():
                direction[name] = direction.get(name, 0.0) + slope / self._runs
            loss += float(done.loss) / self._runs
        # What the model has used for the first time joins from the next step on.
        self._enlist(done.wake)
        leaves = leaves | {VARIANCE + name: log for name, log in logs.items()}
        self._add_prior(direction, means, logs, done.wake.layout.num_data)
        return loss + float(self._divergence()), leaves, direction

    def _add_prior(
        self,
        direction: dict[str, Any],
        means: Mapping[str, Tensor],
        logs: Mapping[str, Tensor],
        num_data: float,
    ) -> None:
        """Minus the gradient of the KL, divided by the number of data."""
        kappa = self.parameter_posterior
        assert kappa is not None
        for name, mean in means.items():
            key, variance = VARIANCE + name, logs[name].detach().exp()
            direction[name] = direction[name] - mean.detach() / (kappa * num_data)
            direction[key] = direction[key] + (1 - variance / kappa) / (2 * num_data)

    def _divergence(self) -> Tensor:
        """``Σ_j KL(N(m_j, τ_j) ‖ N(0, κ))``."""
        kappa = self.parameter_posterior
        assert kappa is not None
        total = torch.zeros(())
        for mean, variance in self.posterior().values():
            terms = (mean.square() + variance) / kappa + math.log(kappa) - variance.log() - 1
            total = total.to(terms) + 0.5 * terms.sum()
        return total

    def _find(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the model's parameters by a run, and make a variance for each of them.

        Raises:
            ValueError: a model without parameters, or one that shares some with the guide.
        """
        known = pyro.get_param_store()._params
        if self._random and all(n in known and VARIANCE + n in known for n in self._random):
            return
        self._random = []  # none yet, or the store was cleared
        with torch.no_grad():
            wake = self.programs.wake(args, kwargs)
        if not parameters(wake.model):
            raise ValueError("parameter_posterior needs a model with parameters; it has none.")
        self._enlist(wake)

    def _enlist(self, wake: Wake) -> None:
        """Make a variance for every parameter of the model that has none."""
        mine, theirs = parameters(wake.model), parameters(wake.guide)
        if mine.keys() == set(self._random):
            return
        if shared := sorted(mine.keys() & theirs.keys()):
            raise ValueError(
                f"parameter {shared[0]!r} belongs to the model and to the guide: it cannot be "
                "drawn from a posterior for one and be a constant for the other. Give the model "
                "and the guide parameters of their own."
            )
        for name in mine:
            self._make_variance(name, mine[name])
        self._random = sorted(mine.keys() | set(self._random))

    def _make_variance(self, name: str, like: Tensor) -> Tensor:
        """The leaf ``log τ`` of a parameter, made on first use."""
        start = torch.full_like(like.detach(), self.parameter_variance)
        store = pyro.get_param_store()
        store.setdefault(VARIANCE + name, start, constraint=constraints.positive)
        return store._params[VARIANCE + name]

    def state_dict(self) -> dict[str, Any]:
        """As the base's; the variances are among the parameters."""
        return {"posterior": list(self._random)} | super().state_dict()

    def _kind(self) -> dict[str, Any]:
        """As the base's; a posterior cannot be had from a state without one."""
        return super()._kind() | {"parameter_posterior": self.parameter_posterior is not None}

    def _first_run(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """As the base's; a saved variance may not exist yet."""
        leaves = super()._first_run(args, kwargs)
        if self._pending is not None and self.parameter_posterior is not None:
            self._random = list(self._pending.get("posterior", []))
            saved = self._pending["parameters"]
            for name in self._random:
                leaves[VARIANCE + name] = self._make_variance(name, saved[name])
        return leaves


@contextmanager
def _moved(leaves: Mapping[str, Tensor], shift: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``leaf + shift`` into the leaves for a while; then exactly the old values again.

    In place, so that every module, constraint and cached reference sees the drawn value.
    """
    saved = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    try:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.add_(shift[name])
        yield
    finally:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(saved[name])
