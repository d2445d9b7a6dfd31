"""Amortised learning by wake-sleep (Wenliang, Moskovitz, Kanagawa and Sahani 2020).

Maximises the likelihood without a guide. ``∇ log p(x) = E[∇ log p(z, x) | x]`` is a regression
from x, and dreams ``(z_n, x_n) ~ p_θ`` are its training set. A linear smoother has weights
``A`` (N, M) from N dreams to M data, so one weighted sum of the dreams' own terms is the
objective, and one backward pass through the run that drew them is the direction::

    ∇_θ Σ_n [η_n · T_n − ᾱ_n Ψ_n],   T = A (w ⊙ S),   ᾱ = A w

with the data's statistics S, their weights w (1/M each), and A a constant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..gradient_models import DirectRegression, ParticleSimulator, make_gradient_model
from ..options import check_counts
from ..sites import parameters, stochastic_sites
from ..trace import Dream, Programs
from .base import HelmholtzELBO, Pass
from .held_out import HeldOut, held_out_dreams, split_rows
from .particles import Simulation, rows_of_jacobian
from .sleep_phase import SleepPhase
from .sleep_set import SleepSet, sleep_set

POOR_COVERAGE = 0.5
NOTHING_MEASURED: dict[str, Any] = {
    "coverage_mean": math.nan,
    "coverage_min": math.nan,
    "held_out_error": math.nan,
    "bandwidth": math.nan,
    "ridge": math.nan,
    "affine": False,
    "num_sleep": 0,
}


@dataclass
class SleepPass(Pass):
    """One run of the model; ``dream.model`` is its trace.

    Attributes:
        held_out: for each turn of the sequential plates.
        fitting_error: what ``adapt`` lowers, a scalar tensor with graph, computed when called;
            None where nothing is held out.
    """

    held_out: list[HeldOut] = field(default_factory=list)
    fitting_error: Callable[[], Tensor] | None = None

    def leaves(self) -> dict[str, Tensor]:
        """Unconstrained leaves of the model's parameters by name."""
        assert self.dream is not None
        return parameters(self.dream.model)


class ALWS_ELBO(HelmholtzELBO):
    """Directions by regression on dreams; see the module's text.

    ``loss`` is ``−Σ_m scale_m Ĵ(x_m)`` (minus ``log_prior``), an estimate of the expected log
    joint under the posterior. It is no bound on the log-likelihood and need not fall.

    Args:
        num_sleep: N, dreams per update, at least 2. ridge: Λ, the **total** ridge: what is added
            to the diagonal of the Gram matrix, never times N.
        kernel: k(x, y) -> (n, m); None is ``GaussianKernel()``.
        gradient_model: "kernel", "random-features", "nystrom", "network" or "direct", or an
            object with ``weights(x, targets)``.
        affine: see ``KernelRegression``. exponential_family: use the natural form of observed
            sites that have one. False regresses log p itself, which has more variance but is
            safer where no dream lies near a datum (little noise, long series): there the natural
            form misjudges parameters of scale.
        held_out: further dreams of the same run that measure the regression's error.
        log_prior: from the dictionary of constrained parameters to a log-density, which counts
            once for the whole data set. condition: ``fn(*args, **kwargs)`` to an array (data
            dimensions, c): variables that the model is conditioned on, joined to the inputs.
        max_plate_nesting: see ``HelmholtzELBO``.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_sleep: int = 2000,
        *,
        ridge: float = 0.1,
        kernel: Any = None,
        gradient_model: Any = "kernel",
        affine: bool = False,
        exponential_family: bool = True,
        held_out: int | None = None,
        log_prior: Callable[[dict[str, Tensor]], Tensor] | None = None,
        condition: Callable[..., Tensor] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(1, max_plate_nesting=max_plate_nesting)
        check_counts(2, num_sleep=num_sleep)
        check_counts(0, held_out=0 if held_out is None else held_out)
        self.num_sleep, self.held_out = num_sleep, held_out or 0
        self.gradient_model = make_gradient_model(
            gradient_model, ridge=ridge, kernel=kernel, affine=affine
        )
        self.direct = isinstance(self.gradient_model, DirectRegression)
        self.regression: Any = self.gradient_model
        if isinstance(self.gradient_model, DirectRegression):
            self.regression = self.gradient_model.regression
        self.families = exponential_family and not self.direct
        self.log_prior, self.condition = log_prior, condition
        self.diagnostics: dict[str, Any] = {}
        self.num_data: int | None = None
        self._warned = False

    def run(self, programs: Programs, args: tuple, kwargs: dict[str, Any]) -> SleepPass:
        """Draw the dreams, fit the regression, and weight the dreams' terms.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
            FloatingPointError: a regression whose weights are not finite.
        """
        phase = SleepPhase(programs, args, kwargs)
        if isinstance(self.gradient_model, ParticleSimulator):
            return self._particle_pass(phase)
        dream, observed = self.dreams(phase)
        trace, layout = dream.model, dream.layout
        done = SleepPass(torch.zeros(()), torch.zeros(()), None, dream)  # type: ignore[arg-type]
        leaves = done.leaves()
        if not leaves and torch.is_grad_enabled():
            raise ValueError("the model has no parameters to train.")
        condition = None if self.condition is None else self.condition(*args, **kwargs)
        report: dict[str, list] = {"coverage": [], "error": []}
        keys = dict.fromkeys(layout.key(site) for _, site in stochastic_sites(trace))
        surrogate, loss = torch.zeros(()), torch.zeros(())
        for key in keys:
            dreams = sleep_set(
                trace, observed, layout, key, families=self.families, condition=condition
            )
            weights, held = self._regress(dreams, report)
            value = self._objective(dreams, weights / layout.num_data, leaves)
            base = (dreams.scale * dreams.log_base).sum()
            surrogate = surrogate.to(value) + value
            loss = loss.to(value) - (value.detach() * layout.num_data + base)
            done.held_out += held
        if self.log_prior is not None:
            prior = self._prior(trace)
            surrogate = surrogate + prior / layout.num_data
            loss = loss - prior.detach()
        self._report(report)
        if done.held_out:
            done.fitting_error = partial(self._fitting_error, done.held_out)
        done.loss, done.surrogate = loss, surrogate
        return done

    def _particle_pass(self, phase: SleepPhase) -> SleepPass:
        """The same with particles of a simulator and no regression (appendix B.1.2)."""
        dream, observed, _ = phase.dream(1)
        call = Simulation(phase, self.gradient_model, self.condition)
        trace, value, loss = call.wake(dream, observed)
        if not parameters(trace) and torch.is_grad_enabled():
            raise ValueError("the model has no parameters to train.")
        if self.log_prior is not None:
            prior = self._prior(trace)
            value, loss = value + prior / dream.layout.num_data, loss - prior.detach()
        self.diagnostics = dict(NOTHING_MEASURED)
        wake = Dream(trace, poutine.Trace(), phase.args, phase.kwargs, dream.layout)
        done = SleepPass(loss, value, None, wake)  # type: ignore[arg-type]

        def error() -> Tensor:
            return call.error(phase.dream(1)[0], list(observed))

        done.fitting_error = error
        return done

    def dreams(self, phase: SleepPhase) -> tuple[Dream, dict[str, Any]]:
        """Run the model once, with as many particles as ``num_sleep`` dreams take.

        The number of particles follows from the number of data, which the run itself shows;
        where it is another one than the last time, the model runs a second time.

        Returns:
            The dreams and the data by observed site.
        """
        if self.num_data is None:
            with torch.no_grad():
                self.num_data = phase.dream(1)[2]
        particles = self._particles(self.num_data)
        dream, observed, self.num_data = phase.dream(particles)
        if self._particles(self.num_data) != particles:
            particles = self._particles(self.num_data)
            dream, observed, _ = phase.dream(particles)
        return dream, observed

    def _particles(self, num_data: int) -> int:
        return -(-(self.num_sleep + self.held_out) // num_data)

    @torch.no_grad()
    def _regress(self, dreams: SleepSet, report: dict) -> tuple[Tensor, list[HeldOut]]:
        """Weights (N, M) of all dreams, times the data's scale; zero for those not used."""
        every, num_data = dreams.inputs, len(dreams.targets)
        train, held = split_rows(len(every), self.num_sleep, self.held_out, every.device)
        inputs = every[train]
        targets = torch.cat([dreams.targets, every[held]])
        if hasattr(self.regression, "prepare"):
            self.regression.prepare(inputs)
        if hasattr(self.regression, "solve"):
            solved, coverage = self.regression.solve(inputs, targets)
        else:
            solved = self.regression.weights(inputs, targets)
            coverage = solved.sum(0)
        if not bool(torch.isfinite(solved).all()):
            raise FloatingPointError(
                "the weights of the regression are not finite: check the kernel, its features "
                "and the ridge. No parameter was changed by this update."
            )
        report["coverage"].append(coverage[:num_data])
        found = []
        if len(held):
            found = [held_out_dreams(dreams, train, held)]
            report["error"].append(found[0].error(solved[:, num_data:]))
        weights = solved.new_zeros(len(dreams.inputs), num_data)
        weights[train] = solved[:, :num_data]
        return weights * dreams.scale, found

    def _fitting_error(self, held_out: list[HeldOut]) -> Tensor:
        errors = [h.error(self.regression.weights(h.inputs, h.targets)) for h in held_out]
        return torch.stack(errors).mean()

    def _objective(self, dreams: SleepSet, weights: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """``Σ_n [η_n·T_n − ᾱ_n Ψ_n]``."""
        mean = weights.sum(1)
        value = -(mean * dreams.psi).sum()
        if self.direct and value.requires_grad:
            return _direct(-dreams.psi, mean, leaves)
        for term in dreams.terms:
            with torch.no_grad():
                every = weights if len(term.natural) > 1 else weights.sum(0, keepdim=True)
                at_data = every @ term.data
            value = value + (term.natural * at_data).sum()
        return value

    def _prior(self, trace: poutine.Trace) -> Tensor:
        assert self.log_prior is not None
        nodes: dict[str, Any] = dict(trace.nodes)
        values = {n: site["value"] for n, site in nodes.items() if site["type"] == "param"}
        prior = torch.as_tensor(self.log_prior(values))
        if prior.numel() != 1:
            raise ValueError(f"log_prior must return one number, got {tuple(prior.shape)}.")
        return prior.reshape(())

    def _report(self, report: dict[str, list]) -> None:
        coverage = torch.cat(report["coverage"])
        errors = [float(e) for e in report["error"]]
        described: Any = getattr(self.regression, "describe", dict)()
        self.diagnostics = {
            **NOTHING_MEASURED,
            **described,
            "coverage_mean": float(coverage.mean()),
            "coverage_min": float(coverage.min()),
            "num_sleep": self.num_sleep,
        }
        if errors:
            self.diagnostics["held_out_error"] = sum(errors) / len(errors)
        if self.diagnostics["coverage_mean"] < POOR_COVERAGE and not self._warned:
            self._warned = True
            warnings.warn(
                f"the dreams cover the data poorly: the regression's weights sum to "
                f"{self.diagnostics['coverage_mean']:.2g} per datum on average, and near 0 the "
                "direction vanishes. Start from a model that is wider than the data, give "
                "affine=True, a wider kernel or more dreams (num_sleep).",
                stacklevel=2,
            )

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """``−Σ_m scale_m Ĵ(x_m)``, see the class; no gradient."""
        with torch.no_grad():
            return float(self.run(self.programs(model, guide), args, kwargs).loss)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a tensor; its gradient is minus the direction, summed over data."""
        done = self.run(self.programs(model, guide), args, kwargs)
        assert done.dream is not None
        surrogate = done.surrogate * done.dream.layout.num_data
        return done.loss - (surrogate - surrogate.detach())


def _direct(values: Tensor, mean: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """A surrogate whose gradient is ``Σ_n ᾱ_n ∇ values_n``, from each sample's own gradient."""
    tensors = list(leaves.values())
    total = [torch.zeros_like(leaf) for leaf in tensors]
    for chunk in torch.arange(len(values), device=values.device).split(256):
        for i, row in enumerate(rows_of_jacobian(values, tensors, chunk)):
            if row is not None:
                total[i] = total[i] + torch.tensordot(mean[chunk], row, 1)
    value = sum((leaf * direction).sum() for leaf, direction in zip(tensors, total, strict=True))
    assert torch.is_tensor(value)
    return (mean * values).sum().detach() + value - value.detach()
