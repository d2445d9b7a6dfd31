"""Run a model or a guide once; the first look at both, and what it finds.

The first look gives the programs' structure, the parameters' starting values and problems
with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from .arguments import Arguments
from .checks import (
    DREAMING,
    PARTICLES,
    RAW,
    Problem,
    Trace,
    bad_starts,
    blame_data,
    check_against_model,
    check_observations,
    check_plates,
    check_point_masses,
    check_sites,
    has_points,
    located,
    problems,
    raise_for,
    stochastic_sites,
    with_particles,
)
from .messengers import Constants, FlatDraws, Particles, PythonFlow, Reached
from .parameters import Held, Params, constraining, unconstrain
from .sites import mutable_values, sampled_values


def once(fn: Callable) -> Callable:
    """A function compiled for few runs, as at the start: fast, into code that need not be fast.

    Inside of another function's ``jit`` it is a part of that.
    """
    alone = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})

    def call(*args: Any) -> Any:
        inside = isinstance(jnp.zeros(()), jax.core.Tracer)
        return (fn if inside else alone)(*args)

    return call


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "transforms", "mutable", "problems"],
    meta_fields=["of_guide"],
)
@dataclass(frozen=True)
class Start:
    """What a first run has found; a pytree.

    Attributes:
        params: constrained, by site name. transforms: of those that have a constraint.
        mutable: state of mutable sites. problems: of the data.
        of_guide: names of the guide's parameters.
    """

    params: Params
    transforms: dict[str, Any]
    mutable: Params
    problems: list[Problem]
    of_guide: frozenset[str]


@dataclass(eq=False)
class Runner:
    """A model and a guide with the options that say how to run them.

    Args:
        model: a NumPyro program with observed sites.
        guide: a NumPyro program with the same latents and the same arguments.
        num_particles: K, at least 1.
        max_plate_nesting: number of batch dimensions; ``math.inf`` finds out by a first run.
        dream_args: ``fn(dreams, *args, **kwargs) -> (args, kwargs)`` for the guide.
        constrained: parameters are given as the programs see them, not unconstrained.
    """

    model: Callable
    guide: Callable
    num_particles: int = 1
    max_plate_nesting: float = math.inf
    dream_args: Callable | None = None
    constrained: bool = False

    def __post_init__(self) -> None:
        self._begin, self._inspect = once(self._start), jax.jit(self._start)

    def sampling(self) -> AbstractContextManager:
        """What becomes of samples: constants."""
        return Constants()

    def run(
        self,
        program: Callable,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        values: dict[str, Array] | None = None,
        mutable: Params | None = None,
        particles: int | None = None,
        dreaming: AbstractContextManager | None = None,
    ) -> Trace:
        """The trace of one program.

        Args:
            program: the model or the guide. rng_key: of its own draws.
            params: by name; one that is missing starts as the program has it.
            args: the program's arguments. kwargs: its keyword arguments.
            values: samples and plate indices to take instead of drawn ones.
            mutable: state of mutable sites. particles: the dimension of K particles, or None.
            dreaming: turns observed sites into sampled ones.
        """
        with ExitStack() as stack:
            stack.enter_context(self.sampling())
            if particles is not None:
                stack.enter_context(Particles(PARTICLES, self.num_particles, dim=particles))
            trace = stack.enter_context(handlers.trace())
            stack.enter_context(handlers.substitute(data=values or {}))
            stack.enter_context(Held(params, mutable or {}, constrained=self.constrained))
            stack.enter_context(FlatDraws())
            stack.enter_context(PythonFlow())
            # Inside the substitution: a site's key does not depend on what is replayed.
            stack.enter_context(handlers.seed(rng_seed=rng_key))
            if dreaming is not None:
                stack.enter_context(dreaming)
            reached = Reached()
            stack.enter_context(reached)
            try:
                program(*args, **kwargs)
            except RAW as error:
                if dreaming is None and particles is None:
                    raise
                situation = DREAMING if dreaming is not None else with_particles(self.num_particles)
                found = located(error, reached.at, situation)
                if found is error:
                    raise
                raise found from error
        return trace

    def first_run(
        self,
        rng_key: Array,
        args: tuple,
        kwargs: dict[str, Any],
        params: Params | None = None,
        mutable: Params | None = None,
        *,
        start: Params | None = None,
    ) -> tuple[Trace, Trace]:
        """Run guide and model once without particles; find out and check their structure.

        Args:
            rng_key: random key. args: the programs' arguments. kwargs: their keyword arguments.
            params: by name; None takes the programs' own starting values.
            mutable: state of mutable sites.
            start: constrained starting values that take precedence over the programs' own.

        Returns:
            The guide's and the model's trace.

        Raises:
            ValueError: a site that cannot be trained so, naming it.
        """
        keys = random.split(rng_key)
        programs = self if params is not None else replace(self, constrained=True)
        held = params if params is not None else dict(start or {})
        with blame_data(args, kwargs):
            guide = programs.run(self.guide, keys[0], held, args, kwargs, mutable=mutable)
            if params is None:  # a parameter of both programs starts as the guide has it
                held |= {n: s["value"] for n, s in guide.items() if s["type"] == "param"}
            model = programs.run(
                self.model,
                keys[1],
                held,
                args,
                kwargs,
                values=sampled_values(guide),
                mutable={**(mutable or {}), **mutable_values(guide)},
            )
        self.check(guide, model)
        for trace in (guide, model):
            for _, site in stochastic_sites(trace):
                check_plates(site)
        if math.isinf(self.max_plate_nesting):
            self.max_plate_nesting = _depth(guide, model)
        return guide, model

    def inspect(
        self,
        rng_key: Array,
        args: tuple,
        kwargs: dict[str, Any],
        params: Params | None = None,
        mutable: Params | None = None,
        *,
        start: Params | None = None,
    ) -> Start:
        """As ``first_run``, compiled, with checks of the values, too.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        if isinstance(self.guide, AutoGuide) and self.guide.prototype_trace is None:
            # It keeps what its first run finds, which must be no part of a compiled program.
            with blame_data(args, kwargs), handlers.block(), handlers.seed(rng_seed=rng_key):
                self.guide(*args, **kwargs)
        arguments = Arguments.of((args, kwargs))
        look = self._begin if params is None else self._inspect  # which runs for all data that come
        found = look(rng_key, arguments, params, mutable, start)
        raise_for(found.problems)
        return found

    def _start(
        self,
        rng_key: Array,
        arguments: Arguments,
        params: Params | None,
        mutable: Params | None,
        start: Params | None,
    ) -> Start:
        args, kwargs = arguments.rebuilt()
        guide, model = self.first_run(rng_key, args, kwargs, params, mutable, start=start)
        sites = [s for t in (model, guide) for s in t.values() if s["type"] == "param"]
        values = {site["name"]: site["value"] for site in sites}
        transforms = constraining(model, guide)
        found = problems(model, guide)
        if params is None:
            found += bad_starts(values, unconstrain(transforms, values))
            if isinstance(self.sampling(), Constants) and has_points(guide, model):
                held = {**(mutable or {}), **mutable_values(guide, model)}
                self._check_point_masses(rng_key, args, kwargs, values, held)
        return Start(
            values,
            transforms,
            mutable_values(guide, model),
            found,
            frozenset(name for name, site in guide.items() if site["type"] == "param"),
        )

    def _check_point_masses(
        self,
        rng_key: Array,
        args: tuple,
        kwargs: dict[str, Any],
        params: Params,
        mutable: Params,
    ) -> None:
        """Refuse Delta sites at parameters where samples are constants."""
        programs = replace(self, constrained=True)

        def traces(at: Params) -> dict[str, Trace]:
            guide, model = programs.first_run(rng_key, args, kwargs, at, mutable)
            return {"model": model, "guide": guide}

        check_point_masses(traces, params)

    def nesting(
        self, rng_key: Array, params: Params, args: tuple, kwargs: dict, **rest: Any
    ) -> int:
        """The number of plate dimensions, found once."""
        if math.isinf(self.max_plate_nesting):
            self.first_run(rng_key, args, kwargs, params, **rest)
        return int(self.max_plate_nesting)

    def check(self, guide: Trace, model: Trace) -> None:
        """Refuse structure that cannot be trained.

        Raises:
            ValueError: naming the site.
        """
        check_sites(guide, "guide")
        check_sites(model, "model")
        check_against_model(model, guide)
        check_observations(model)


def _depth(*traces: Trace) -> int:
    sites = [site for trace in traces for _, site in stochastic_sites(trace)]
    return max((-f.dim for site in sites for f in site["cond_indep_stack"]), default=0)
