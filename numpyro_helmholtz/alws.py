"""The front end of amortised learning by wake-sleep: ``ALWS(model)``, without a guide."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random
from numpyro.infer.svi import SVIRunResult

from . import branches
from .arguments import Arguments
from .checks import Problem, raise_for
from .estimators.alws import ALWS_ELBO, SleepPass
from .estimators.base import Pass
from .estimators.sleep_phase import no_guide
from .gradient_models import NetworkRegression, ParticleSimulator
from .optimiser import of_numpyro
from .options import check_counts
from .parameters import Params, strong
from .regression import DEFAULT_RIDGE
from .svi import HelmholtzState, HelmholtzSVI

DEFAULT_HELD_OUT = 200
DEFAULT_ADAPT = 1e-3
POOR_COVERAGE = 0.5
REPORT = ("coverage_mean", "coverage_min", "held_out_error", "bandwidth", "ridge", "affine")


class Regression(NamedTuple):
    """The regression's part of the state; a pytree.

    Attributes:
        learned: what ``adapt`` moves, or its optimiser's state where something is adapted.
        fixed: what was drawn at the start. report: of the last update, see ``diagnostics``.
    """

    learned: Any
    fixed: Any
    report: dict[str, Array]


class ALWS(HelmholtzSVI):
    """Amortised learning by wake-sleep (Wenliang et al. 2020); see ``ALWS_ELBO``.

    An update draws ``num_sleep`` dreams, fits the regression to them, and follows its gradient
    at the data. The model starts well where it is wider than the data: ``diagnostics`` has the
    coverage, and poor coverage warns once.

    Args:
        model: a NumPyro program with observed sites. It needs no guide.
        optim: an optimiser of ``numpyro.optim`` or an optax transformation; None is SGD of
            rate 0.05.
        num_sleep: dreams per update. With M data in the plates that all sites share, the model
            runs with the least number of particles whose dreams suffice. A latent outside these
            plates makes the whole observation one datum.
        ridge: Λ, the **total** ridge: what is added to the diagonal, never times ``num_sleep``.
        kernel, gradient_model, affine, exponential_family, log_prior, condition: see
            ``ALWS_ELBO``. max_plate_nesting: see ``HelmholtzELBO``.
        adapt: learn the regression's own parameters (bandwidth, features, ridge) on held-out
            dreams, after each update: a rate for Adam, an optimiser of ``numpyro.optim`` or an
            optax transformation. None adapts nothing, except that networks and simulators are
            always trained, at rate 1e-3.
        adapt_every: updates per adaptation.
        held_out: dreams, from the same run of the model, that the regression is not fitted to.
            None: 200 where something is adapted, else 0.
        average: see ``HelmholtzSVI``. The dreams are those of the points, where the update is
            taken, and so the regression adapts to them. It has no means itself.

    Raises:
        TypeError: an optimiser or a kernel of the wrong kind.
        ValueError: an option out of its range.
    """

    estimator: ALWS_ELBO
    untrained = "the model has no parameters to train."

    def __init__(
        self,
        model: Callable,
        optim: Any = None,
        num_sleep: int = 2000,
        *,
        ridge: float = DEFAULT_RIDGE,
        kernel: Any = None,
        gradient_model: Any = "kernel",
        affine: bool = False,
        exponential_family: bool = True,
        adapt: Any = None,
        adapt_every: int = 1,
        held_out: int | None = None,
        average: bool = False,
        log_prior: Callable[[Params], Any] | None = None,
        condition: Callable[..., Any] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        estimator = ALWS_ELBO(
            num_sleep,
            ridge=ridge,
            kernel=kernel,
            gradient_model=gradient_model,
            affine=affine,
            exponential_family=exponential_family,
            held_out=held_out,
            log_prior=log_prior,
            condition=condition,
            max_plate_nesting=max_plate_nesting,
        )
        trained = isinstance(estimator.regression, NetworkRegression | ParticleSimulator)
        self.adapt = _adapter(DEFAULT_ADAPT if adapt is None and trained else adapt)
        check_counts(adapt_every=adapt_every)
        self.adapt_every = adapt_every
        fits = self.adapt is not None and not isinstance(estimator.regression, ParticleSimulator)
        if fits and held_out is None:
            estimator.held_out = DEFAULT_HELD_OUT
        if fits and estimator.held_out < 2:
            raise ValueError(f"adapt needs at least 2 held-out dreams, got held_out={held_out!r}.")
        super().__init__(model, no_guide, optim, estimator, average=average)
        self._first = jax.jit(self._first_regression)
        self._warned = False

    # the regression as the memory of the state

    def _fisher_init(
        self, rng_key: Array, params: Params, args: tuple, kwargs: dict, mutable: Params
    ) -> Regression:
        """The regression before the first update.

        Raises:
            ValueError: dreams or a kernel that are not finite.
        """
        arguments = Arguments.of((args, kwargs))
        memory, found = self._first(rng_key, params, arguments, mutable)
        raise_for(found)
        return memory

    def _first_regression(
        self, rng_key: Array, params: Params, arguments: Arguments, mutable: Params
    ) -> tuple[Regression, list[Problem]]:
        args, kwargs = arguments.rebuilt()
        gamma, found = self.estimator.init_gamma(
            self.programs, rng_key, params, args, kwargs, mutable
        )
        learned = strong(gamma["learned"])
        dtype = jnp.result_type(float)
        report = {name: jnp.full((), math.nan, dtype) for name in REPORT}
        learned = learned if self.adapt is None else self.adapt.init(learned)
        return Regression(learned, strong(gamma["fixed"]), report), found

    def _gamma(self, memory: Regression) -> dict[str, Any]:
        learned = memory.learned
        if self.adapt is not None:
            learned = self.adapt.get_params(learned)
        return {"learned": learned, "fixed": memory.fixed}

    def _pass(
        self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Pass, Params]:
        """Dream and regress; the gradient is by site name."""
        run_key, own_key = random.split(random.split(state.rng_key)[1])
        params = self._optimiser.params(state.optim_state)
        objective = partial(self._objective, state, run_key, args, kwargs)
        (_, done), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return replace(done, params=params, rng_key=own_key, step=state.step), gradient

    def _objective(
        self, state: HelmholtzState, rng_key: Array, args: tuple, kwargs: dict, params: Params
    ) -> tuple[Array, Pass]:
        gamma, mutable = self._gamma(state.memory), state.mutable_state
        return self.estimator.run(
            self.programs, rng_key, params, args, kwargs, mutable, gamma=gamma
        )

    def _direction(self, done: Pass, gradient: Params, memory: Any) -> tuple[Params, Any]:
        assert isinstance(done, SleepPass) and done.report is not None
        report = {n: jnp.asarray(v, memory.report[n].dtype) for n, v in done.report.items()}
        learned = memory.learned
        if self.adapt is not None:
            assert done.step is not None
            if self.adapt_every == 1:
                learned = self._adapted(memory, done)
            else:
                due = (done.step + 1) % self.adapt_every == 0
                learned = branches.cond(due, lambda: self._adapted(memory, done), learned)
        return gradient, Regression(learned, memory.fixed, report)

    def _adapted(self, memory: Regression, done: SleepPass) -> Any:
        """One step of the regression's own parameters, downhill in the held-out error."""
        assert self.adapt is not None
        if done.lesson is not None:
            return self.adapt.update(done.lesson, memory.learned, value=jnp.zeros(()))
        assert done.held_out is not None
        held_out = done.held_out

        def error(learned: Params) -> Array:
            gamma = {"learned": learned, "fixed": memory.fixed}
            solved, _ = self.estimator.solve(held_out.inputs, held_out.targets, gamma)
            return held_out.error(solved)

        value, gradient = jax.value_and_grad(error)(self.adapt.get_params(memory.learned))
        return self.adapt.update(gradient, memory.learned, value=value)

    # looking

    def update(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """One update of all parameters; pure, to be run inside ``jit`` or ``lax.scan``.

        Returns:
            The new state, and ``−Σ_m scale_m Ĵ(x_m)`` before the update, see ``ALWS_ELBO``.
            It is no bound.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        state, loss = super().update(state, *args, **kwargs)
        self._warn(state)
        return state, loss

    def run(self, *args: Any, **kwargs: Any) -> SVIRunResult:
        """See ``HelmholtzSVI.run``; the losses are those of ``update``."""
        result = super().run(*args, **kwargs)
        self._warn(result.state)
        return result

    def diagnostics(self, state: HelmholtzState) -> dict[str, Any]:
        """What the last update showed; NaN before the first.

        ``coverage_mean`` and ``coverage_min`` are the sums of the regression's weights per datum
        (before the affine correction): near 1 where the dreams cover the data, near 0 where the
        direction vanishes. ``held_out_error`` is the mean squared error over the variance of the
        target, NaN where it is not measured. It stays above 0 however good the regression is,
        since the latents vary given x. Further keys: ``bandwidth``, ``ridge`` (the total),
        ``affine``, ``num_sleep``.
        """
        found: dict[str, Any] = {n: float(v) for n, v in state.memory.report.items()}
        for name, value in found.items():
            if value == -1:  # there is none; the state must stay finite
                found[name] = math.nan
        found["affine"] = found["affine"] == 1
        return {**found, "num_sleep": self.estimator.num_sleep}

    def _warn(self, state: HelmholtzState) -> None:
        """Say once that the dreams cover the data poorly; not inside ``jit``."""
        coverage = state.memory.report["coverage_mean"]
        if self._warned or isinstance(coverage, jax.core.Tracer):
            return
        if coverage == -1 or not coverage < POOR_COVERAGE:
            return
        self._warned = True
        warnings.warn(
            f"the dreams cover the data poorly: the regression's weights sum to "
            f"{float(coverage):.2g} per datum on average, and near 0 the direction vanishes. "
            "Start from a model that is wider than the data, give affine=True, a wider kernel or "
            "more dreams (num_sleep).",
            stacklevel=3,
        )

    def _bound(self, state: HelmholtzState, arguments: Arguments) -> Array:
        args, kwargs = arguments.rebuilt()
        run_key, _ = random.split(random.split(state.rng_key)[1])
        _, done = self._objective(state, run_key, args, kwargs, self._read(state))
        assert done.loss is not None
        return done.loss


def _adapter(adapt: Any) -> Any:
    """The optimiser of the regression's own parameters, or None."""
    if adapt is None:
        return None
    if isinstance(adapt, float | int):
        if not (adapt > 0 and math.isfinite(adapt)):
            raise ValueError(f"adapt must be a positive rate or an optimiser, got {adapt!r}.")
        return numpyro.optim.Adam(float(adapt))
    return of_numpyro(adapt)


__all__ = ["ALWS"]
