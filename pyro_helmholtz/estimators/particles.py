"""Amortised learning by particles (Wenliang et al. 2020, appendix B.1.2).

A simulator draws latents for an observation. Its direction is the mean of ``∇_θ log p`` over the
particles, and it is trained so that this is the regression of ``∇_θ log p(z, x)`` on x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..checks import latents
from ..gradient_models import ParticleSimulator
from ..layout import Layout
from ..sites import parameters
from ..trace import Dream
from .sleep_phase import SleepPhase
from .sleep_set import log_joint, sleep_set


@dataclass
class Simulation:
    """The calls of one update with a simulator.

    Attributes:
        phase: the model. simulator: of the latents. condition: see ``ALWS_ELBO``.
    """

    phase: SleepPhase
    simulator: ParticleSimulator
    condition: Callable[..., Tensor] | None

    def wake(self, dream: Dream, observed: dict[str, Any]) -> tuple[poutine.Trace, Tensor, Tensor]:
        """The data under simulated latents.

        Args:
            dream: a run of the model. observed: the data by site.

        Returns:
            The model's trace, the surrogate (a mean over data) and the loss.
        """
        with torch.no_grad():
            values = self._latents(dream, observed, of_data=True)
        # The dream's subsample indices are used again, so that the data are the same.
        trace = self._replay(values | _subsamples(dream.model), dream.layout, dreaming=False)
        joint, scale = log_joint(trace, dream.layout)
        per_datum = joint.reshape(self.simulator.num_particles, -1).mean(0)
        total = (scale * per_datum).sum()
        return trace, total / dream.layout.num_data, -total.detach()

    def error(self, dream: Dream, observed: list[str]) -> Tensor:
        """``mean_n (ĝ₁ − t_n)·(ĝ₂ − t_n)`` on dreams, differentiable in the simulator."""
        leaves = list(parameters(dream.model).values())
        joint, _ = log_joint(dream.model, dream.layout)
        count = torch.arange(len(joint), device=joint.device)
        truth = [_zero_if_none(g) for g in rows_of_jacobian(joint, leaves, count)]
        values = self._latents(dream, dict.fromkeys(observed), of_data=False)
        nodes: dict[str, Any] = dict(dream.model.nodes)
        values |= {name: nodes[name]["value"] for name in observed}
        trace = self._replay(values | _subsamples(dream.model), dream.layout, dreaming=True)
        simulated, _ = log_joint(trace, dream.layout)
        halves = simulated.reshape(2, self.simulator.num_particles // 2, -1).mean(1)
        total = torch.zeros(()).to(joint)
        for true, *errors in zip(
            truth,
            *(rows_of_jacobian(half, leaves, count, create_graph=True) for half in halves),
            strict=True,
        ):
            first, second = (_zero_if_none(g) - true for g in errors)
            total = total + (first * second).sum() / len(joint)
        return total

    def _latents(self, dream: Dream, observed: dict[str, Any], of_data: bool) -> dict[str, Tensor]:
        """The simulator's draws, in the shapes of the model's sites."""
        if dream.layout.sequential:
            raise ValueError(
                f"the model has the sequential plates {dream.layout.sequential}: a simulator "
                "of latents needs vectorised ones."
            )
        nodes: dict[str, Any] = dict(dream.model.nodes)
        data = {n: nodes[n]["value"] if v is None else v for n, v in observed.items()}
        condition = None
        if self.condition is not None:
            condition = self.condition(*self.phase.args, **self.phase.kwargs)
        with torch.no_grad():
            dreams = sleep_set(
                dream.model, data, dream.layout, (), families=False, condition=condition
            )
        draws = self.simulator.particles(dreams.targets if of_data else dreams.inputs)
        wanted = {n: s for n, s in latents(dream.model).items() if n not in observed}
        if not isinstance(draws, dict) or set(draws) != set(wanted):
            got = sorted(draws) if isinstance(draws, dict) else type(draws).__name__
            raise ValueError(
                f"the simulator must return the latent sites {sorted(wanted)} of the model, "
                f"got {got}."
            )
        count = self.simulator.num_particles
        return {
            name: _as_site(name, draws[name], (count, *site["value"].shape[1:]))
            for name, site in wanted.items()
        }

    def _replay(self, values: dict[str, Any], layout: Layout, *, dreaming: bool) -> poutine.Trace:
        count = self.simulator.num_particles
        return self.phase.replay(values, layout, count, dreaming=dreaming)


def rows_of_jacobian(
    values: Tensor, leaves: list[Tensor], which: Tensor, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of single elements of ``values``: (len(which), *leaf) for each leaf."""
    seeds = torch.zeros(len(which), len(values)).to(values)
    seeds[torch.arange(len(which), device=which.device), which] = 1.0
    return torch.autograd.grad(
        values,
        leaves,
        seeds,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=True,
    )


def _zero_if_none(value: Tensor | None) -> Tensor:
    return torch.zeros(()) if value is None else value


def _as_site(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape[0] != shape[0] or value.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"the simulator's values of latent site {name!r} have shape {tuple(value.shape)}; "
            f"the site takes {shape}."
        )
    return value.reshape(shape)


def _subsamples(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site["value"]
        for name, site in nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample"
    }
