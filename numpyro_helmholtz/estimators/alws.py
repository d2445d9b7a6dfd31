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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from ..checks import Problem, Trace
from ..gradient_models import DirectRegression, ParticleSimulator, make_gradient_model
from ..layout import Layout
from ..options import check_counts
from ..parameters import Params
from ..regression import DEFAULT_RIDGE
from ..sites import mutable_values
from ..trace import Programs
from .base import HelmholtzELBO, Pass
from .held_out import HeldOut, held_out_dreams, split_rows
from .particles import Simulation
from .sleep_phase import ModelAlone, SleepPhase, no_guide
from .sleep_set import SleepSet, sleep_set

Gamma = dict[str, Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("loss", "model", "guide", "dream", "mutable", "params", "rng_key", "step"),
        *("num_data", "report", "held_out", "gamma", "lesson"),
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class SleepPass(Pass):
    """One run of the model.

    Attributes:
        num_data: sum of the data's scales. report: what the diagnostics say.
        held_out: None without held-out dreams. gamma: of the regression.
        lesson: the gradient of a simulator's error in its parameters, downhill.
    """

    num_data: Any = None
    report: dict[str, Any] | None = None
    held_out: HeldOut | None = None
    gamma: Gamma | None = None
    lesson: Params | None = None


class ALWS_ELBO(HelmholtzELBO):
    """Directions by regression on dreams; see the module's text.

    ``loss`` is ``−Σ_m scale_m Ĵ(x_m)`` (minus ``log_prior``), an estimate of the expected log
    joint under the posterior. It is no bound on the log-likelihood and need not fall. Used as a
    loss of ``numpyro.infer.SVI``, with any guide, it sets what the regression draws or
    measures (bandwidth, projection) anew at each step.

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
        ridge: float = DEFAULT_RIDGE,
        kernel: Any = None,
        gradient_model: Any = "kernel",
        affine: bool = False,
        exponential_family: bool = True,
        held_out: int | None = None,
        log_prior: Callable[[Params], Any] | None = None,
        condition: Callable[..., Any] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(1, max_plate_nesting=max_plate_nesting)
        check_counts(2, num_sleep=num_sleep)
        held_out = 0 if held_out is None else held_out
        check_counts(0, held_out=held_out)
        for name, fn in (("log_prior", log_prior), ("condition", condition)):
            if fn is not None and not callable(fn):
                raise TypeError(f"{name} must be callable, got {type(fn).__name__}.")
        model = make_gradient_model(gradient_model, ridge=ridge, kernel=kernel, affine=affine)
        self.direct = isinstance(model, DirectRegression)
        self.regression: Any = model.regression if isinstance(model, DirectRegression) else model
        self.families = exponential_family and not self.direct
        self.num_sleep, self.held_out = num_sleep, held_out
        self.log_prior, self.condition = log_prior, condition

    def programs(self, model: Callable, guide: Callable, *, constrained: bool = False) -> Programs:
        """The model with this estimator's options; the guide does not count."""
        return ModelAlone(model, no_guide, 1, self.max_plate_nesting, constrained=constrained)

    def dreams(self, phase: SleepPhase, params: Params) -> tuple[Trace, SleepSet, Layout]:
        """Run the model once, with as many particles as the dreams take.

        Args:
            phase: the model on its arguments. params: by name.

        Returns:
            The trace, the dreams as matrices, and the plates.

        Raises:
            ValueError: a model that cannot dream, naming the site.
        """
        simulated = isinstance(self.regression, ParticleSimulator)
        count = None if simulated else self.num_sleep + self.held_out
        trace, observed, layout = phase.dream(params, count)
        condition = None
        if self.condition is not None:
            condition = self.condition(*phase.args, **phase.kwargs)
        dreams = sleep_set(trace, observed, layout, families=self.families, condition=condition)
        return trace, dreams, layout

    def _split(self, total: int) -> tuple[np.ndarray, np.ndarray]:
        return split_rows(total, self.num_sleep, self.held_out)

    # the regression

    def init_gamma(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
    ) -> tuple[Gamma, list[Problem]]:
        """γ of the regression from a first sleep set, and what may be wrong with it.

        Args:
            programs, rng_key, params, args, kwargs, mutable: see ``run``.
        """
        dream_key, own_key = random.split(rng_key)
        phase = SleepPhase(programs, dream_key, args, kwargs, mutable)
        _, dreams, _ = self.dreams(phase, params)
        inputs = dreams.inputs
        if not isinstance(self.regression, ParticleSimulator):
            inputs = inputs[self._split(len(inputs))[0]]
        gamma = self._init(own_key, inputs)
        if isinstance(self.regression, ParticleSimulator):
            return gamma, dreams.problems
        solved, _ = self.solve(inputs, dreams.targets, gamma)
        message = (
            "the regression's weights on a first sleep set have {count} values that are not "
            "finite: check the kernel, its features and the ridge."
        )
        return gamma, [*dreams.problems, Problem(jnp.sum(~jnp.isfinite(solved)), message)]

    def _init(self, rng_key: Array, inputs: Array) -> Gamma:
        """γ; empty for a user's object without ``init``."""
        if hasattr(self.regression, "init"):
            return self.regression.init(rng_key, inputs)
        return {"learned": {}, "fixed": {}}

    def solve(self, inputs: Array, targets: Array, gamma: Gamma) -> tuple[Array, Array]:
        """Weights (N, M) and their coverage (M,)."""
        if hasattr(self.regression, "solve"):
            return self.regression.solve(inputs, targets, gamma)
        rest = (gamma,) if hasattr(self.regression, "init") else ()
        weights = self.regression.weights(inputs, targets, *rest)
        return weights, weights.sum(0)

    def run(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
        *,
        gamma: Gamma | None = None,
        samples: Params | None = None,
    ) -> tuple[Array, Pass]:
        """Dream, regress, and weigh the dreams' own terms.

        Args:
            programs: of ``programs``. rng_key: random key. params: by name.
            args, kwargs: of the model. mutable: state of mutable sites.
            gamma: of the regression; None draws and measures it from these dreams.
            samples: dreams to take instead of drawn ones, by site.

        Returns:
            The surrogate, whose gradient in ``params`` is the direction of ascent per datum,
            and the pass.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        phase = SleepPhase(programs, rng_key, args, kwargs, mutable, samples)
        trace, dreams, layout = self.dreams(phase, params)
        if isinstance(self.regression, ParticleSimulator):
            call = Simulation(phase, self.regression, trace, dreams, layout)
            return self._simulate(call, params, gamma)
        train, held = self._split(len(dreams.inputs))
        inputs, held_inputs = dreams.inputs[train], dreams.inputs[held]
        if gamma is None:
            gamma = self._init(random.fold_in(rng_key, 1), inputs)
        gamma = lax.stop_gradient(gamma)
        targets = jnp.concatenate([dreams.targets, held_inputs])
        solved, coverage = lax.stop_gradient(self.solve(inputs, targets, gamma))
        num_data = len(dreams.targets)
        weights = solved[:, :num_data] * dreams.scale / layout.num_data
        if self.direct:
            value = self._direct(phase, params, weights)
        else:
            every = jnp.zeros((len(dreams.inputs), num_data), weights.dtype).at[train].set(weights)
            value = _objective(dreams, every)
        base = (dreams.scale * dreams.log_base).sum()
        if self.log_prior is not None:
            value = value + self._prior(trace) / layout.num_data
        loss = lax.stop_gradient(-(value * layout.num_data + base))
        held_out = held_out_dreams(dreams, train, held) if len(held) else None
        report = self._report(coverage[:num_data], solved[:, num_data:], held_out, gamma, inputs)
        mutable = mutable_values(trace)
        done = SleepPass(
            *(loss, None, None, None, mutable),
            num_data=lax.stop_gradient(jnp.asarray(layout.num_data)),
            report=report,
            held_out=held_out,
            gamma=gamma,
        )
        return value, done

    def _simulate(
        self, call: Simulation, params: Params, gamma: Gamma | None
    ) -> tuple[Array, Pass]:
        """The same with particles of a simulator and no regression (appendix B.1.2)."""
        key = random.fold_in(call.phase.rng_key, 2)
        if gamma is None:
            gamma = self._init(random.fold_in(call.phase.rng_key, 1), call.dreams.inputs)
        value, loss = call.wake(key, params, gamma["learned"])
        if self.log_prior is not None:
            prior = self._prior(call.dream)
            value = value + prior / call.layout.num_data
            loss = loss - lax.stop_gradient(prior)
        lesson = jax.grad(lambda learned: call.error(key, params, learned))(gamma["learned"])
        nothing = jnp.full((), -1.0, value.dtype)
        names = ("held_out_error", "bandwidth", "ridge", "coverage_mean", "coverage_min")
        report = {"affine": 0 * nothing}
        done = SleepPass(
            *(loss, None, None, None, mutable_values(call.dream)),
            num_data=lax.stop_gradient(jnp.asarray(call.layout.num_data)),
            report=report | dict.fromkeys(names, nothing),
            gamma=gamma,
            lesson=lax.stop_gradient(lesson),
        )
        return value, done

    def _prior(self, trace: Trace) -> Array:
        assert self.log_prior is not None
        values = {n: site["value"] for n, site in trace.items() if site["type"] == "param"}
        prior = jnp.asarray(self.log_prior(values))
        if prior.size != 1:
            raise ValueError(f"log_prior must return one number, got shape {prior.shape}.")
        return prior.reshape(())

    def _report(
        self,
        coverage: Array,
        held_weights: Array,
        held_out: HeldOut | None,
        gamma: Gamma,
        inputs: Array,
    ) -> dict[str, Array]:
        """What the diagnostics say, as arrays; -1 for what there is not."""
        described: dict[str, Any] = {"bandwidth": -1.0, "ridge": -1.0, "affine": False}
        if hasattr(self.regression, "describe"):
            described = self.regression.describe(gamma, inputs)
        error = -1.0 if held_out is None else held_out.error(held_weights)
        found = {
            "coverage_mean": coverage.mean(),
            "coverage_min": coverage.min(),
            "held_out_error": error,
            **described,
        }
        return {n: lax.stop_gradient(jnp.asarray(v, coverage.dtype)) for n, v in found.items()}

    def _direct(self, phase: SleepPhase, params: Params, weights: Array) -> Array:
        """A surrogate whose gradient is ``Σ_n ᾱ_n ∇ log p(z_n, x_n)``, sample by sample."""

        def values(params: Params) -> Array:
            _, dreams, _ = self.dreams(phase, params)
            return -dreams.psi[self._split(len(dreams.inputs))[0]]

        frozen = lax.stop_gradient(params)
        found, pull = jax.vjp(values, frozen)
        mean = weights.sum(1)

        def one(seed: Array, weight: Array) -> Params:
            return jax.tree.map(lambda g: weight * g, pull(seed)[0])

        def add(total: Params, row: tuple[Array, Array]) -> tuple[Params, None]:
            seed = (jnp.arange(len(mean)) == row[0]).astype(found.dtype)
            return jax.tree.map(jnp.add, total, one(seed, row[1])), None

        zero = jax.tree.map(jnp.zeros_like, frozen)
        total, _ = lax.scan(add, zero, (jnp.arange(len(mean)), mean))
        moved = jax.tree.map(lambda p, at, g: ((p - at) * g).sum(), params, frozen, total)
        return (mean * found).sum() + sum(jax.tree.leaves(moved), jnp.zeros(()))

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Params,
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See ``HelmholtzELBO``."""
        programs = self.programs(model, guide, constrained=True)
        surrogate, done = self.run(programs, rng_key, param_map, args, kwargs, param_map)
        assert isinstance(done, SleepPass) and done.loss is not None
        value = surrogate * done.num_data
        return {
            "loss": done.loss - (value - lax.stop_gradient(value)),
            "mutable_state": done.mutable or None,
        }


def _objective(dreams: SleepSet, weights: Array) -> Array:
    """``Σ_n [η_n·T_n − ᾱ_n Ψ_n]`` with the weights of all dreams, zero for those held out."""
    value = -(weights.sum(1) * dreams.psi).sum()
    for term in dreams.terms:
        every = weights if len(term.natural) > 1 else weights.sum(0, keepdims=True)
        value = value + (term.natural * lax.stop_gradient(every @ term.data)).sum()
    return value
