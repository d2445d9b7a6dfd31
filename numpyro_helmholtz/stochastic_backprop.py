"""The front end ``StochasticBackprop``, and a Gaussian posterior over the model's parameters.

With ``parameter_posterior`` every parameter θ_j of the model has the posterior ``N(m_j, τ_j)`` and
the prior ``N(0, κ)`` (Rezende, Mohamed and Wierstra 2014, appendix G). The free energy is::

    F = −E[ELBO(θ)] + ½ Σ_j [m_j²/κ + τ_j/κ + log κ − log τ_j − 1]

so ``∂F/∂m_j = −E[∂ELBO/∂θ_j] + m_j/κ``; the paper's equation 46 lacks κ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random

from .arguments import Arguments
from .estimators.base import Pass
from .estimators.reparameterised import StochasticBackprop_ELBO
from .optimiser import Optimiser
from .parameters import Params, parameters
from .svi import HelmholtzState, HelmholtzSVI

LEARNING_RATE = 1e-3
LOG_VARIANCE = "posterior_variance"
DRAWS = ("step", "particle")


@dataclass(frozen=True)
class PosteriorOptimiser(Optimiser):
    """Optimise the programs' parameters, which are means, and log-variances beside them.

    Args:
        variance: where the variances of the model's parameters start.
    """

    variance: float = 1e-6

    def init(self, params: Params, of_guide: frozenset[str]) -> Any:
        """The state before the first step.

        Raises:
            ValueError: a model without parameters, or one of a name that is taken.
        """
        of_model = {name: v for name, v in params.items() if name not in of_guide}
        if not of_model:
            raise ValueError(
                "parameter_posterior needs parameters of the model, which has none of its own: "
                f"all are the guide's, {sorted(of_guide)}."
            )
        if LOG_VARIANCE in params:
            raise ValueError(
                f"parameter {LOG_VARIANCE!r} has the name that parameter_posterior keeps its "
                "log-variances under; rename it."
            )
        start = math.log(self.variance)
        spread = jax.tree.map(lambda mean: jnp.full_like(mean, start), of_model)
        return self.host.init({**params, LOG_VARIANCE: spread})

    def params(self, state: Any, program: str | None = None) -> Params:
        """Unconstrained values of the programs' parameters by site name."""
        return _of_programs(self.everything(state))

    def everything(self, state: Any) -> Params:
        """Those, and the log-variances."""
        return self.host.get_params(state)


class StochasticBackprop(HelmholtzSVI):
    """Stochastic backpropagation; see ``StochasticBackprop_ELBO``.

    Args:
        model, guide: see ``HelmholtzSVI``; all latents of the guide are reparameterisable.
        optim: see ``HelmholtzSVI``; None is Adam of rate 0.001.
        num_particles, estimator, entropy, hessian, num_probes, max_plate_nesting: see
            ``StochasticBackprop_ELBO``.
        parameter_posterior: prior variance κ > 0 of the model's parameters, unconstrained, which
            then get a Gaussian posterior; None for a point estimate. The data's scale has to be
            right for it: ``numpyro.plate("data", size, subsample_size=...)`` tells how many there
            are. A parameter of both programs is refused.
        parameter_variance: the posterior variances' start τ > 0. Their logarithms are trained.
        parameter_draws: "step" (all data and particles of a step share one draw of the
            parameters) or "particle" (each particle has its own).
        average: see ``HelmholtzSVI``. The m and log τ of a posterior have means likewise.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any = None,
        num_particles: int = 1,
        *,
        estimator: str = "path",
        parameter_posterior: float | None = None,
        parameter_variance: float = 1e-6,
        parameter_draws: str = "step",
        average: bool = False,
        **options: Any,
    ) -> None:
        elbo = StochasticBackprop_ELBO(num_particles, estimator=estimator, **options)
        super().__init__(model, guide, optim, elbo, average=average)
        self._elbo = elbo
        _positive("parameter_posterior", parameter_posterior, optional=True)
        _positive("parameter_variance", parameter_variance)
        if parameter_draws not in DRAWS:
            raise ValueError(f"parameter_draws must be one of {DRAWS}, got {parameter_draws!r}.")
        self.parameter_posterior, self.parameter_draws = parameter_posterior, parameter_draws
        if parameter_posterior is not None:
            self._optimiser = PosteriorOptimiser(self.optim, False, float(parameter_variance))

    def default_optimiser(self) -> Any:
        """Adam of rate 0.001."""
        return numpyro.optim.Adam(LEARNING_RATE)

    def init(
        self, rng_key: Array, *args: Any, init_params: Params | None = None, **kwargs: Any
    ) -> HelmholtzState:
        """The state before the first update; see ``HelmholtzSVI.init``.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site; with
                ``parameter_posterior``, a parameter that both programs use.
        """
        if self.parameter_posterior is not None:
            guide, model = self._names(rng_key, args, kwargs)
            if guide & model:
                raise ValueError(
                    f"parameter {min(guide & model)!r} is used by the model and by the guide: with "
                    "parameter_posterior the model's is random and the guide's is not. Give them "
                    "two names."
                )
        return super().init(rng_key, *args, init_params=init_params, **kwargs)

    def _names(self, rng_key: Array, args: tuple, kwargs: dict) -> list[set[str]]:
        """Names of the guide's and of the model's parameters."""
        found: list[set[str]] = []

        def look(rng_key: Array, arguments: Arguments) -> None:
            for trace in self.programs.first_run(rng_key, *arguments.rebuilt()):
                found.append({name for name, site in trace.items() if site["type"] == "param"})

        jax.eval_shape(look, rng_key, Arguments.of((args, kwargs)))
        return found

    # one pass

    def _pass(
        self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Pass, Params]:
        """Run the programs for the next update; the gradient is by site name."""
        if self.parameter_posterior is None:
            return super()._pass(state, args, kwargs)
        run_key, own_key = random.split(random.split(state.rng_key)[1])
        everything = self._optimiser.everything(state.optim_state)

        def objective(everything: Params) -> tuple[Array, Pass]:
            run = self._drawn if self.parameter_draws == "step" else self._drawn_by_particle
            value, num_data, done = run(run_key, everything, args, kwargs, state.mutable_state)
            divergence = self._divergence(everything)
            assert done.loss is not None
            done = replace(done, loss=done.loss + jax.lax.stop_gradient(divergence))
            return value - divergence / num_data, done

        (_, done), gradient = jax.value_and_grad(objective, has_aux=True)(everything)
        params = self._optimiser.params(state.optim_state)
        return replace(done, params=params, rng_key=own_key, step=state.step), gradient

    def _drawn(
        self,
        rng_key: Array,
        everything: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params,
    ) -> tuple[Array, Any, Pass]:
        """The surrogate, the number of data and the pass at one draw of the parameters."""
        run_key, draw_key = random.split(rng_key)
        params = _draw(draw_key, everything)
        value, done = self.estimator.run(self.programs, run_key, params, args, kwargs, mutable)
        assert done.model is not None
        return value, jax.lax.stop_gradient(done.model.layout.num_data), done

    def _drawn_by_particle(
        self,
        rng_key: Array,
        everything: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params,
    ) -> tuple[Array, Any, Pass]:
        """As ``_drawn``, each particle with parameters of its own."""
        alone = replace(self.programs, num_particles=1)

        def particle(rng_key: Array) -> tuple[Array, Array, Array]:
            run_key, draw_key = random.split(rng_key)
            params = _draw(draw_key, everything)
            value, done = self.estimator.run(alone, run_key, params, args, kwargs, mutable)
            if done.mutable:
                raise ValueError(
                    f"parameter_draws='particle' cannot carry mutable state, such as "
                    f"{min(done.mutable)!r}: each particle would have its own. Use 'step'."
                )
            assert done.model is not None and done.loss is not None
            return value, done.loss, jnp.asarray(done.model.layout.num_data)

        keys = random.split(rng_key, self.programs.num_particles)
        values, losses, counts = jax.vmap(particle)(keys)
        done = Pass(losses.mean(), None, None, None, {})
        return values.mean(), jax.lax.stop_gradient(counts[0]), done

    def _divergence(self, everything: Params) -> Array:
        """The divergence of the parameters' posterior from their prior."""
        prior = self.parameter_posterior
        assert prior is not None
        total: Any = 0.0
        for mean, log_variance in _pairs(everything):
            terms = (mean**2 + jnp.exp(log_variance)) / prior - log_variance - 1
            total = total + 0.5 * (terms + math.log(prior)).sum()
        return total

    # looking

    def _bound(self, state: HelmholtzState, arguments: Arguments) -> Array:
        """Minus the ELBO at the parameters' means, plus their divergence from the prior."""
        loss = super()._bound(state, arguments)
        if self.parameter_posterior is None:
            return loss
        return loss + self._divergence(self._read_everything(state))

    def _read(self, state: HelmholtzState) -> Params:
        read = super()._read(state)
        return read if self.parameter_posterior is None else _of_programs(read)

    def _read_everything(self, state: HelmholtzState) -> Params:
        """As others see it, log-variances included: the means where there are any."""
        if self.average:
            return state.average.means
        return self._optimiser.everything(state.optim_state)

    def posterior(self, state: HelmholtzState) -> dict[str, tuple[Array, Array]]:
        """Mean and variance of each of the model's parameters, unconstrained, by joined name.

        Raises:
            ValueError: without ``parameter_posterior``.
        """
        if self.parameter_posterior is None:
            raise ValueError(
                "there is no posterior over parameters: give parameter_posterior=κ, the prior "
                "variance of the model's parameters."
            )
        everything = self._read_everything(state)
        names = parameters(everything[LOG_VARIANCE])
        return {
            name: (mean, jnp.exp(log_variance))
            for name, (mean, log_variance) in zip(names, _pairs(everything), strict=True)
        }

    def structure(self, rng_key: Array, *args: Any, **kwargs: Any) -> dict[str, str]:
        """How each latent is trained, by site: estimator, Hessian and entropy."""
        found: dict[str, str] = {}

        def look(rng_key: Array, arguments: Arguments) -> None:
            guide, _ = self.programs.first_run(rng_key, *arguments.rebuilt())
            found.update(self._elbo.describe(guide))

        jax.eval_shape(look, rng_key, Arguments.of((args, kwargs)))
        return found


def _of_programs(everything: Params) -> Params:
    """The programs' parameters, without the log-variances beside them."""
    return {name: value for name, value in everything.items() if name != LOG_VARIANCE}


def _pairs(everything: Params) -> list[tuple[Array, Array]]:
    """Means and log-variances of the model's parameters, leaf by leaf."""
    spread = everything[LOG_VARIANCE]
    means = {name: everything[name] for name in spread}
    return list(zip(jax.tree.leaves(means), jax.tree.leaves(spread), strict=True))


def _draw(rng_key: Array, everything: Params) -> Params:
    """The programs' parameters, ``m + √τ ε`` for those of the model."""
    means, structure = jax.tree.flatten({n: everything[n] for n in everything[LOG_VARIANCE]})
    logs = jax.tree.leaves(everything[LOG_VARIANCE])
    keys = random.split(rng_key, len(means))
    drawn = [
        mean + jnp.exp(0.5 * log) * random.normal(key, mean.shape, mean.dtype)
        for mean, log, key in zip(means, logs, keys, strict=True)
    ]
    return {**_of_programs(everything), **jax.tree.unflatten(structure, drawn)}


def _positive(name: str, value: Any, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}.")


__all__ = ["StochasticBackprop"]
