"""Run model and guide: wake traces, dream traces and per-datum log-weights.

A *wake* trace draws ``K`` particles from the guide on the data and replays them in the
model. A *dream* trace draws data and latents from the model and scores them by the guide.
Samples are constants in both: no gradient flows from one site into another.

Conventions: ``K`` particles stand in the leftmost batch dimension. Log-weights are kept per
datum, i.e. along every plate that all sites share; what lies between is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine

from .checks import (
    DREAMING,
    blame_data,
    check_against_model,
    check_observations,
    check_plates,
    check_point_masses,
    check_sites,
    with_particles,
)
from .first_look import (
    check_more_particles,
    check_own_dreams,
    check_particles,
    check_reads_dreams,
    random_state,
)
from .layout import Layout
from .messengers import Detached, Dreaming, Particles, record
from .pairing import pair_dreams, with_dreams
from .sites import (
    in_data_type,
    log_probs,
    only_subsamples,
    stochastic_sites,
)


def guess_max_plate_nesting(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> int:
    """Run both programs once and return the depth of their deepest plate.

    Raises:
        ValueError: a batch dimension that no plate declares, naming the site. In later runs it
            could not be told from the particles where it has their size.
    """
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
    for trace in (guide_trace, model_trace):
        for _, site in stochastic_sites(trace):
            check_plates(site)
    dims = [
        -frame.dim
        for trace in (guide_trace, model_trace)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return max(dims, default=0)


def _log_sum_exp(value: torch.Tensor) -> torch.Tensor:
    """``logsumexp`` over the first dimension, by kernels that are quicker on the CPU."""
    top = value.amax(0)
    return torch.where(top.isfinite(), top - value.log_softmax(0).amax(0), top)


def _without_negligible(weights: torch.Tensor) -> torch.Tensor:
    """The weights; 0 in place of those whose products with rounding errors underflow.

    They are at most the square of the precision: 1e-31 in float32, 1e-292 in float64.
    """
    limits = torch.finfo(weights.dtype)
    least = min(limits.tiny / limits.eps, limits.eps**2)
    return torch.nn.functional.threshold(weights, least, 0.0)


@dataclass
class Wake:
    """K particles of the guide on the data, replayed in the model.

    Attributes:
        model: the model's trace. guide: the guide's.
        layout: plates and scales. num_particles: K.
        log_p, log_q: of the model's sites and of the guide's latents.
    """

    model: poutine.Trace
    guide: poutine.Trace
    layout: Layout
    num_particles: int
    per_turn: dict[tuple, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_p = log_probs(self.model, self.layout)
        self.log_q = log_probs(self.guide, self.layout, observed=False)
        for terms, sign in ((self.log_p, 1.0), (self.log_q, -1.0)):
            for term in terms:
                value = sign * self.layout.reduce(term.value.detach())
                known = self.per_turn.get(term.turn)
                self.per_turn[term.turn] = value if known is None else known + value

    @property
    def log_weights(self) -> torch.Tensor:
        """``log w``, shape (K, number of data), unscaled."""
        self.layout.check_weights()
        return torch.cat([w.reshape(len(w), -1) for w in self.per_turn.values()], 1)

    def bound(self, power: float = 1.0) -> torch.Tensor:
        """``Σ_b scale_b · 1/a · (logsumexp_s a log w − log S)``, a scalar on the host's scale.

        The power a is 1 for the log-likelihood's bound and ½ for the bidirectional machine's.
        """
        self.layout.check_weights()
        total: torch.Tensor | None = None
        for log_w in self.per_turn.values():
            log_sum = _log_sum_exp(power * log_w if power != 1.0 else log_w)
            per_datum = (log_sum - math.log(self.num_particles)) / power
            bound = (self.layout.common_scale * per_datum).sum()
            total = bound if total is None else total + bound
        return torch.zeros(()) if total is None else total

    def weights(self, power: float = 1.0) -> dict[tuple, torch.Tensor]:
        """``wᵃ`` normalised, by turn, shape (K, data dimensions...); sum over particles is 1.

        Weights so small that products with them would be subnormal are 0: they count for nothing
        and a CPU takes many times as long for them.
        """
        self.layout.check_weights()
        return {
            key: _without_negligible((power * log_w).softmax(0))
            for key, log_w in self.per_turn.items()
        }

    def uniform(self) -> dict[tuple, torch.Tensor]:
        """The weights 1/K of plain wake-sleep and of the guide's Fisher matrix."""
        return {k: torch.full_like(w, 1.0 / self.num_particles) for k, w in self.per_turn.items()}


@dataclass
class Dream:
    """Data and latents of the model, scored by the guide.

    Attributes:
        model: the model's trace with every site sampled. guide: the guide's, replayed.
        args, kwargs: what the guide was called with. layout: plates and scales.
    """

    model: poutine.Trace
    guide: poutine.Trace
    args: tuple
    kwargs: dict[str, Any]
    layout: Layout


@dataclass
class Programs:
    """A model and a guide with the options that say how to run them.

    Args:
        model: a Pyro program with observed sites.
        guide: a Pyro program with the same latents and the same arguments.
        num_particles: K, at least 1.
        max_plate_nesting: number of batch dimensions; ``math.inf`` finds out by a first run.
        dream_args: ``fn(dreams, *args, **kwargs) -> (args, kwargs)`` for the guide.
    """

    model: Callable
    guide: Callable
    num_particles: int = 1
    max_plate_nesting: float = math.inf
    dream_args: Callable | None = None
    validated: set[str] = field(default_factory=set)

    def validation(self, phase: str) -> AbstractContextManager:
        """The host's validation runs in a phase's first pass, and costs nothing after it.

        What may change later, the data, is checked in every step by ``check_observations``.
        """
        if phase not in self.validated:
            return nullcontext()
        return pyro.validation_enabled(False)

    def nesting(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """The number of plate dimensions, found once."""
        if math.isinf(self.max_plate_nesting):
            self.max_plate_nesting = guess_max_plate_nesting(self.model, self.guide, args, kwargs)
        return int(self.max_plate_nesting)

    @contextmanager
    def particles(
        self, nesting: int, sampling: AbstractContextManager | None = None
    ) -> Iterator[None]:
        """Run programs with K particles in the leftmost dimension.

        Args:
            nesting: number of plate dimensions. sampling: what is done to samples; by default
                they are constants.
        """
        plate = Particles(self.num_particles, -1 - nesting, constant=sampling is None)
        with sampling or nullcontext(), plate:
            yield

    def wake(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        samples: poutine.Trace | None = None,
        sampling: AbstractContextManager | None = None,
    ) -> Wake:
        """Draw K particles (or take those of ``samples``) and score them by both programs.

        Args:
            args: the programs' arguments. kwargs: their keyword arguments.
            samples: a trace of the guide whose values are used again.
            sampling: what is done to samples; by default they are constants.

        Raises:
            ValueError: a site that cannot be trained so, naming it.
        """
        blame = partial(blame_data, self.model, args, kwargs)
        with blame():
            nesting = self.nesting(args, kwargs)
        with blame(), self.validation("wake"), self.particles(nesting, sampling):
            situation = with_particles(self.num_particles)
            guide_trace = record(self.guide, args, kwargs, samples, situation)
            check_sites(guide_trace, "guide")
            model_trace = record(self.model, args, kwargs, guide_trace, situation)
        check_sites(model_trace, "model")
        check_against_model(model_trace, guide_trace)
        if sampling is None and torch.is_grad_enabled():
            check_point_masses(model_trace, "model")
            check_point_masses(guide_trace, "guide")
        check_observations(model_trace)
        sites = [site for _, site in stochastic_sites(model_trace)]
        layout = Layout.of(sites, nesting)
        wake = Wake(model_trace, guide_trace, layout, self.num_particles)
        if "wake" not in self.validated:
            check_particles(self, self.guide, args, kwargs, guide_trace, nesting)
            check_particles(self, self.model, args, kwargs, model_trace, nesting)
            if samples is None and sampling is None:
                check_more_particles(self, args, kwargs, guide_trace, model_trace)
        self.validated.add("wake")
        return wake

    def dream(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        subsample: poutine.Trace | None = None,
        with_grad: bool = False,
    ) -> Dream:
        """Draw one dream per datum from the model and score its latents by the guide.

        Args:
            args: the programs' arguments. kwargs: their keyword arguments.
            subsample: a trace whose subsample indices are used again.
            with_grad: keep the graph of the model (for the model's Fisher on dreams).

        Raises:
            ValueError: a factor in the model, or no pairing of dreams with guide arguments.
        """
        nesting = self.nesting(args, kwargs)
        known = None if subsample is None else only_subsamples(subsample)
        dreaming = Dreaming()
        first = "arguments" not in self.validated
        random, own = random_state() if first else (), (args, kwargs)
        with self.validation("dream"):
            with torch.set_grad_enabled(with_grad), Detached(), dreaming:
                model_trace = record(self.model, args, kwargs, known, DREAMING)
            check_sites(model_trace, "model")
            drawn: dict[str, Any] = dict(model_trace.nodes)
            dreams = {n: in_data_type(drawn[n], x) for n, x in dreaming.observed.items()}
            if first:
                again = with_dreams(dreaming.observed, dreams, args, kwargs)
                check_own_dreams(self, model_trace, *again, known, random)
            args, kwargs, unread = pair_dreams(
                dreaming.observed, dreams, args, kwargs, self.guide, self.dream_args
            )
            with Detached():
                guide_trace = record(self.guide, args, kwargs, model_trace)
        unread.check()
        check_sites(guide_trace, "guide")
        if first:
            check_reads_dreams(self, guide_trace, dreaming.observed, dreams, *own)
            self.validated.add("arguments")
        sites = [site for _, site in stochastic_sites(model_trace)]
        self.validated.add("dream")
        return Dream(model_trace, guide_trace, args, kwargs, Layout.of(sites, nesting))


def wake_trace(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    max_plate_nesting: float = math.inf,
    samples: poutine.Trace | None = None,
    validated: set[str] | None = None,
) -> Wake:
    """K particles of the guide on the data; ``.log_weights`` has shape (K, number of data).

    Values of ``samples``, such as the indices of a subsample, are used again. What one call has
    looked at, which goes into ``validated``, the next need not.
    """
    options: dict[str, Any] = {} if validated is None else {"validated": validated}
    programs = Programs(model, guide, num_particles, max_plate_nesting, **options)
    return programs.wake(args, kwargs, samples)
