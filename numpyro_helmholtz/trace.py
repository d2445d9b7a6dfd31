"""Run model and guide: wake traces, dream traces and per-datum log-weights.

A *wake* trace draws ``K`` particles from the guide on the data and replays them in the
model. A *dream* trace draws data and latents from the model and scores them by the guide.
Samples are constants in both: no gradient flows from one site into another.

Conventions: ``K`` particles stand in the leftmost batch dimension. Log-weights are kept per
datum, i.e. along every plate that all sites share; what lies between is summed. Everything is
a pure function of the random key, the parameters and the arguments; run it inside ``jit``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.scipy.special import logsumexp

from .checks import (
    Trace,
    blame_data,
    check_declared,
    check_sites,
    stochastic_sites,
)
from .first_look import (
    check_more_particles,
    check_own_dreams,
    check_particles,
    check_reads_dreams,
)
from .layout import Layout
from .messengers import Constants, Dreaming
from .pairing import pair_dreams
from .parameters import Params, parameters, rebuild
from .runner import Runner
from .sites import (
    in_data_type,
    mutable_values,
    sampled_values,
    site_log_prob,
    subsample_values,
)


@dataclass
class Wake:
    """K particles of the guide on the data, replayed in the model.

    Attributes:
        model: the model's trace. guide: the guide's.
        layout: plates and scales. num_particles: K.
        keys: random keys that the guide and the model ran with.
        states: mutable state that the guide and the model started from.
        log_w: ``log w`` without gradient, shape (K, data dimensions...), unscaled.
    """

    model: Trace
    guide: Trace
    layout: Layout
    num_particles: int
    keys: tuple[Array, Array]
    states: tuple[Params, Params] = ({}, {})

    def __post_init__(self) -> None:
        total: Any = 0.0
        for trace, sign in ((self.model, 1.0), (self.guide, -1.0)):
            for _, site in stochastic_sites(trace):
                if trace is self.guide and site["is_observed"]:
                    continue
                log_prob = site_log_prob(site)
                check_declared(site, log_prob.shape, self.layout.ndim, "log-probabilities")
                total = total + sign * self.layout.reduce(lax.stop_gradient(log_prob))
        self.log_w: Array = total

    @property
    def log_weights(self) -> Array:
        """``log w``, shape (K, number of data), unscaled."""
        self.layout.check_weights()
        return self.log_w.reshape(len(self.log_w), -1)

    def bound(self, power: float = 1.0) -> Array:
        """``Σ_b scale_b · 1/a · (logsumexp_s a log w − log S)``, a scalar on the host's scale.

        The power a is 1 for the log-likelihood's bound and ½ for the bidirectional machine's.
        """
        self.layout.check_weights()
        per_datum = (logsumexp(power * self.log_w, 0) - math.log(self.num_particles)) / power
        return (self.layout.common_scale * per_datum).sum()

    def weights(self, power: float = 1.0) -> Array:
        """``wᵃ`` normalised, shape (K, data dimensions...); the sum over particles is 1."""
        self.layout.check_weights()
        return jax.nn.softmax(power * self.log_w, 0)

    def uniform(self) -> Array:
        """The weights 1/K of plain wake-sleep and of the guide's Fisher matrix."""
        return jnp.full_like(self.log_w, 1.0 / self.num_particles)

    @property
    def mutable(self) -> Params:
        """Mutable state after the guide's and then the model's run."""
        return mutable_values(self.guide, self.model)


@dataclass
class Dream:
    """Data and latents of the model, scored by the guide.

    Attributes:
        model: the model's trace with every site sampled. guide: the guide's, replayed.
        args, kwargs: what the guide was called with. layout: plates and scales.
        keys: random keys that the guide and the model ran with.
    """

    model: Trace
    guide: Trace
    args: tuple
    kwargs: dict[str, Any]
    layout: Layout
    keys: tuple[Array, Array]


@dataclass(eq=False)
class Programs(Runner):
    """The phases of a model and a guide; the options are ``Runner``'s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.woken, self.dreamt = False, False  # whether each phase has been looked at

    def wake(
        self,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        samples: dict[str, Array] | None = None,
        *,
        mutable: Params | None = None,
    ) -> Wake:
        """Draw K particles (or take those of ``samples``) and score them by both programs.

        Args:
            rng_key: random key. params: by name, unconstrained unless ``constrained``.
            args: the programs' arguments. kwargs: their keyword arguments.
            samples: value of each of the guide's latents, K in the leftmost batch dimension.
            mutable: state of mutable sites.

        Raises:
            ValueError: a site that cannot be trained so, naming it.
        """
        nesting = self.nesting(rng_key, params, args, kwargs, mutable=mutable)
        keys = random.split(rng_key)
        run = partial(self.run, params=params, args=args, kwargs=kwargs, particles=-1 - nesting)
        with blame_data(args, kwargs):
            guide = run(self.guide, keys[0], values=samples, mutable=mutable)
            held = {**(mutable or {}), **mutable_values(guide)}
            model = run(self.model, keys[1], values=sampled_values(guide), mutable=held)
        self.check(guide, model)
        _check_complete(params, guide, model)
        if not self.woken:
            check_particles(self, partial(run, self.guide, keys[0], mutable=mutable), guide)
            check_particles(self, partial(run, self.model, keys[1], mutable=held), model)
            if not samples and isinstance(self.sampling(), Constants):
                check_more_particles(self, rng_key, params, args, kwargs, mutable, guide, model)
            self.woken = True
        layout = Layout.of(model, nesting)
        states = (mutable or {}, held)
        return Wake(model, guide, layout, self.num_particles, (keys[0], keys[1]), states)

    def dream(
        self,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        subsample: dict[str, Array] | None = None,
        mutable: Params | None = None,
    ) -> Dream:
        """Draw one dream per datum from the model and score its latents by the guide.

        Args:
            rng_key: random key. params: by name, unconstrained unless ``constrained``.
            args: the programs' arguments. kwargs: their keyword arguments.
            subsample: indices of subsampled plates to use again.
            mutable: state of mutable sites.

        Raises:
            ValueError: a factor in the model, or no pairing of dreams with guide arguments.
        """
        nesting = self.nesting(rng_key, params, args, kwargs, mutable=mutable)
        keys = random.split(rng_key)
        dreaming = Dreaming()
        run = partial(self.run, params=params, mutable=mutable)
        model = run(
            self.model, keys[1], args=args, kwargs=kwargs, values=subsample, dreaming=dreaming
        )
        check_sites(model, "model")
        dreams = {name: in_data_type(model[name], x) for name, x in dreaming.observed.items()}
        if not self.dreamt:
            check_own_dreams(self, run, keys[1], dreaming.observed, args, kwargs, subsample)
        own = (args, kwargs)
        args, kwargs, unread = pair_dreams(
            dreaming.observed, dreams, args, kwargs, self.guide, self.dream_args
        )
        guide = run(self.guide, keys[0], args=args, kwargs=kwargs, values=sampled_values(model))
        unread.check()
        check_sites(guide, "guide")
        if not self.dreamt:
            dreamt = (dreaming.observed, dreams, *own)
            check_reads_dreams(self, partial(run, self.guide, keys[0]), params, guide, *dreamt)
            self.dreamt = True
        layout = Layout.of(model, nesting)
        return Dream(model, guide, args, kwargs, layout, (keys[0], keys[1]))

    def again(
        self,
        program: str,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        values: dict[str, Array],
        *,
        mutable: Params | None,
        particles: int | None,
        dreamt: bool,
    ) -> Trace:
        """Run "model" or "guide" once more on given samples; see ``Recipe.run``."""
        fn = self.model if program == "model" else self.guide
        dreaming = Dreaming() if dreamt and program == "model" else None
        return self.run(
            fn,
            rng_key,
            params,
            args,
            kwargs,
            values=values,
            mutable=mutable,
            particles=particles,
            dreaming=dreaming,
        )


def _check_complete(params: Params, *traces: Trace) -> None:
    """Refuse a parameter that would stay at its start for ever."""
    for trace in traces:
        for name, site in trace.items():
            if site["type"] == "param" and name not in params:
                raise ValueError(
                    f"parameter {name!r} of the programs is not among the given ones, "
                    f"{sorted(params)}. Parameters must all appear in init's run."
                )


def wake_trace(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    max_plate_nesting: float = math.inf,
) -> Wake:
    """K particles of the guide on the data; ``.log_weights`` has shape (K, number of data).

    ``params`` are constrained, as ``get_params`` gives them.
    """
    programs = Programs(model, guide, num_particles, max_plate_nesting, constrained=True)
    return programs.wake(rng_key, params, args, kwargs)


__all__ = [
    "Dream",
    "Params",
    "Programs",
    "Wake",
    "mutable_values",
    "parameters",
    "rebuild",
    "sampled_values",
    "site_log_prob",
    "stochastic_sites",
    "subsample_values",
    "wake_trace",
]
