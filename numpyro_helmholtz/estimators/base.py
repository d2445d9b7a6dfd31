"""What all estimators share: two phases, a surrogate whose gradient is the direction.

An estimator runs the programs and returns a scalar whose gradient is the direction of
*ascent*, a mean over data, and a ``Pass``: what the phases saw. It knows nothing of Fisher
matrices.
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
from numpyro.infer.elbo import ELBO

from ..checks import Trace, stochastic_sites
from ..layout import Layout, site_scale
from ..options import check_counts
from ..recipe import Recipe
from ..trace import Dream, Params, Programs, Wake, site_log_prob, subsample_values


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "model", "guide", "dream", "mutable", "params", "rng_key", "step"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Pass:
    """What one run of the programs saw; a pytree, arrays only.

    Attributes:
        loss: minus the bound, on the host's scale. None in a pass of dreams alone.
        model: the wake phase's model with the weights ``w̃``, to be run again; None in a pass of
            dreams alone. guide: the wake phase's guide with the weights 1/K; likewise.
        dream: the guide on dreams; None without a sleep phase.
        mutable: state of mutable sites after the wake phase.
        params: unconstrained, where the gradient was taken. rng_key: a key of this pass that
            nothing else has used. step: number of updates before this one.
    """

    loss: Array | None
    model: Recipe | None
    guide: Recipe | None
    dream: Recipe | None
    mutable: Params
    params: Params | None = None
    rng_key: Array | None = None
    step: Array | None = None


def score(trace: Trace, layout: Layout, weights: Array | None, *, observed: bool = True) -> Array:
    """``Σ_sites scale · weight · log p / number of data``, differentiable in the parameters.

    Args:
        trace: of a program. layout: of the model. weights: (K, data dimensions...); None for 1.
        observed: with observed sites.
    """
    total: Any = 0.0
    for _, site in stochastic_sites(trace):
        if site["is_observed"] and not observed:
            continue
        log_prob = site_log_prob(site)
        scale = site_scale(site)
        if not (isinstance(scale, float | int) and scale == 1):
            log_prob = log_prob * scale
        if weights is not None:
            log_prob = weights * layout.reduce(log_prob)
        total = total + log_prob.sum()
    return jnp.asarray(total / layout.num_data)


class HelmholtzELBO(ELBO):
    """Base of the estimators, with the interface that ``numpyro.infer.SVI`` asks for.

    Args:
        num_particles: K, at least 1.
        max_plate_nesting: number of plate dimensions; found by a first run if infinite.
        dream_args: ``fn(dreams, *args, **kwargs) -> (args, kwargs)`` for the guide's sleep.

    Raises:
        ValueError: an option out of its range.
    """

    can_infer_discrete = True
    sleep_scale = 1.0
    power = 1.0  # of w = p/q in the weights of the particles

    def __init__(
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        check_counts(num_particles=num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.max_plate_nesting = max_plate_nesting
        self.dream_args = dream_args

    def programs(self, model: Callable, guide: Callable, *, constrained: bool = False) -> Programs:
        """The programs with this estimator's options."""
        return Programs(
            model,
            guide,
            self.num_particles,
            self.max_plate_nesting,
            self.dream_args,
            constrained,
        )

    def weights(self, wake: Wake) -> Array:
        """The particles' normalised weights, see ``Wake.weights``."""
        return wake.weights(self.power)

    def bound(self, wake: Wake) -> Array:
        """What is maximised, on the host's scale, see ``Wake.bound``."""
        return wake.bound(self.power)

    def run(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
    ) -> tuple[Array, Pass]:
        """Run the phases of one update.

        Returns:
            The surrogate, whose gradient in ``params`` is the direction of ascent per datum,
            and the pass.
        """
        raise NotImplementedError

    def sleep(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
        wake: Wake | None = None,
    ) -> tuple[Array, Pass]:
        """One dream per datum, on the wake phase's subsample.

        Returns:
            ``sleep_scale · mean_r log q(h_r | x_r)`` and a pass of the dreams alone.
        """
        subsample = subsample_values(wake.guide) if wake is not None else None
        dream = programs.dream(rng_key, params, args, kwargs, subsample=subsample, mutable=mutable)
        value = score(dream.guide, dream.layout, None, observed=False)
        recipe = _dream_recipe(dream, mutable)
        return self.sleep_scale * value, Pass(None, None, None, recipe, mutable or {})

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Params,
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The loss; its gradient is minus the direction, summed over data.

        Args:
            rng_key: random key. param_map: constrained values and mutable state by site name,
                as ``numpyro.infer.SVI`` hands them over. model, guide, args, kwargs: programs
                and their arguments.
        """
        programs = self.programs(model, guide, constrained=True)
        surrogate, done = self.run(programs, rng_key, param_map, args, kwargs, param_map)
        assert done.model is not None and done.loss is not None
        value = surrogate * lax.stop_gradient(done.model.layout.num_data)
        loss = lax.stop_gradient(done.loss) - (value - lax.stop_gradient(value))
        return {"loss": loss, "mutable_state": done.mutable or None}


def wake_pass(
    wake: Wake,
    args: tuple,
    kwargs: dict[str, Any],
    dream: Recipe | None,
    power: float = 1.0,
) -> Pass:
    """The pass of a wake phase and, where there was one, a sleep phase.

    Args:
        wake: the phase. args, kwargs: of the programs. dream: the sleep phase's guide.
        power: of the weights and of the bound, see ``Wake.weights``.
    """
    return Pass(
        lax.stop_gradient(-wake.bound(power)),
        Recipe.of_wake("model", wake, wake.weights(power), args, kwargs),
        Recipe.of_wake("guide", wake, wake.uniform(), args, kwargs),
        dream,
        wake.mutable,
    )


def _dream_recipe(dream: Dream, mutable: Params | None) -> Recipe:
    return Recipe.of_dream("guide", dream, dream.args, dream.kwargs, mutable)


def split(rng_key: Array) -> tuple[Array, Array]:
    """Keys of the wake and of the sleep phase."""
    wake_key, sleep_key = random.split(rng_key)
    return wake_key, sleep_key
