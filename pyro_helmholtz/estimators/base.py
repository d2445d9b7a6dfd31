"""What all estimators share: two phases, a surrogate whose gradient is the direction.

An estimator runs the programs and returns a ``Pass``: the loss, and a scalar whose gradient
is the direction of *ascent*, a mean over data. It knows nothing of Fisher matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from ..layout import Layout
from ..options import check_counts
from ..sites import LogProb, log_probs, parameters
from ..trace import Dream, Programs, Wake


@dataclass
class Pass:
    """One run of the programs.

    Attributes:
        loss: minus the bound, on the host's scale (a float tensor without graph).
        surrogate: scalar, its gradient is the direction of ascent per datum.
        wake, dream: the traces; dream is None without a sleep phase.
    """

    loss: Tensor
    surrogate: Tensor
    wake: Wake
    dream: Dream | None

    def leaves(self) -> dict[str, Tensor]:
        """Unconstrained leaves of all parameters by name."""
        traces = [self.wake.model, self.wake.guide]
        traces += [self.dream.model, self.dream.guide] if self.dream else []
        return parameters(*traces)


def score(
    trace: poutine.Trace,
    layout: Layout,
    weights: Mapping[tuple, Tensor] | None,
    *,
    observed: bool = True,
    terms: list[LogProb] | None = None,
) -> Tensor:
    """``Σ_sites scale · weight · log p / number of data``, differentiable in the parameters.

    Args:
        trace: of a program. layout: of the model. weights: per turn of the sequential plates,
            (K, data dimensions); None for 1. observed: with observed sites.
        terms: the trace's ``log_probs``, if known.
    """
    total: Tensor | None = None
    for term in log_probs(trace, layout, observed=observed) if terms is None else terms:
        value, scale = term.value, term.scale
        if not value.requires_grad:
            continue
        if torch.is_tensor(scale) or scale != 1.0:
            value = value * scale
        if weights is not None:
            value = weights[term.turn] * layout.reduce(value)
        total = value.sum() if total is None else total + value.sum()
    return torch.zeros(()) if total is None else total / layout.num_data


class HelmholtzELBO(ELBO):
    """Base of the estimators, with the interface that ``pyro.infer.SVI`` asks for.

    Args:
        num_particles: K, at least 1.
        max_plate_nesting: number of plate dimensions; found by a first run if infinite.
        dream_args: ``fn(dreams, *args, **kwargs) -> (args, kwargs)`` for the guide's sleep.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        check_counts(num_particles=num_particles)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=True,
        )
        self.max_plate_nesting = max_plate_nesting  # the host's counts the particles too
        self.dream_args = dream_args
        self._programs: Programs | None = None

    sleep_scale = 1.0
    power = 1.0  # of w = p/q in the weights of the particles

    def weights(self, wake: Wake) -> dict[tuple, Tensor]:
        """The particles' normalised weights, see ``Wake.weights``."""
        return wake.weights(self.power)

    def bound(self, wake: Wake) -> Tensor:
        """What is maximised, on the host's scale, see ``Wake.bound``."""
        return wake.bound(self.power)

    def programs(self, model: Callable, guide: Callable) -> Programs:
        """The programs with this estimator's options, remembered between calls."""
        known = self._programs
        if known is None or known.model is not model or known.guide is not guide:
            self._programs = Programs(
                model, guide, self.num_particles, self.max_plate_nesting, self.dream_args
            )
        assert self._programs is not None
        return self._programs

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        """The host's hook: the wake traces of model and guide."""
        wake = self.programs(model, guide).wake(args, kwargs)
        return wake.model, wake.guide

    def run(self, programs: Programs, args: tuple, kwargs: dict[str, Any]) -> Pass:
        """Run the phases of one update."""
        raise NotImplementedError

    def sleep(self, programs: Programs, wake: Wake, args: tuple, kwargs: dict) -> Dream:
        """One dream per datum, on the wake phase's subsample."""
        return programs.dream(args, kwargs, subsample=wake.guide)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the K-particle bound, on the host's scale; no gradient."""
        with torch.no_grad():
            return float(-self.bound(self.programs(model, guide).wake(args, kwargs)))

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a tensor; its gradient is minus the direction, summed over data."""
        done = self.run(self.programs(model, guide), args, kwargs)
        surrogate = done.surrogate * done.wake.layout.num_data
        return done.loss - (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Add the loss's gradient to every parameter's ``.grad`` and return the loss."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())
