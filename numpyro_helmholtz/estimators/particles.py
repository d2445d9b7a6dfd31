"""Amortised learning by particles (Wenliang et al. 2020, appendix B.1.2).

A simulator draws latents for an observation. Its direction is the mean of ``∇_θ log p`` over the
particles, and it is trained so that this is the regression of ``∇_θ log p(z, x)`` on x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ..checks import Trace, latents
from ..gradient_models import ParticleSimulator
from ..layout import Layout
from ..messengers import Dreaming
from ..parameters import Params
from ..sites import subsample_values
from .sleep_phase import SleepPhase
from .sleep_set import SleepSet, log_joint


class Simulated(Dreaming):
    """A dreaming program whose replayed values keep their gradient.

    Args:
        values: by site.
    """

    def __init__(self, values: Params) -> None:
        super().__init__()
        self.values = values

    def postprocess_message(self, msg: Any) -> None:
        """Undo what ``Constants`` has done; the trace has its copy already, see ``restore``."""
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def restore(self, trace: Trace) -> Trace:
        """The trace with the values themselves."""
        return {
            name: {**site, "value": self.values[name]}
            if site["type"] == "sample" and name in self.values
            else site
            for name, site in trace.items()
        }


@dataclass
class Simulation:
    """The calls of one update with a simulator.

    Attributes:
        phase: the model. simulator: of the latents. dream: a run of the model with one particle.
        dreams: the same as matrices. layout: its plates.
    """

    phase: SleepPhase
    simulator: ParticleSimulator
    dream: Trace
    dreams: SleepSet
    layout: Layout

    def wake(self, rng_key: Array, params: Params, simulator: Params) -> tuple[Array, Array]:
        """The data under simulated latents.

        Args:
            rng_key: of the simulator's noise. params: of the model. simulator: its parameters.

        Returns:
            The surrogate (a mean over data) and the loss.
        """
        count = self.simulator.num_particles
        values = self._latents(rng_key, self.dreams.targets, simulator)
        # The dream's subsample indices are used again, so that the data are the same.
        values = lax.stop_gradient(values) | subsample_values(self.dream)
        joint, scale = log_joint(self._replay(params, values, count), self.layout)
        total = (scale * joint.reshape(count, -1).mean(0)).sum()
        return total / self.layout.num_data, -lax.stop_gradient(total)

    def error(self, rng_key: Array, params: Params, simulator: Params) -> Array:
        """``mean_n (ĝ₁ − t_n)·(ĝ₂ − t_n)`` on dreams, differentiable in the simulator.

        Args:
            rng_key, params, simulator: see ``wake``.
        """
        count = self.simulator.num_particles
        params = lax.stop_gradient(params)
        data = {name: self.dream[name]["value"] for name in self.dreams.observed}
        data |= subsample_values(self.dream)
        latent = {name: self.dream[name]["value"] for name in self._names}
        simulated = self._latents(rng_key, self.dreams.inputs, simulator)

        def joint(params: Params, values: Params, particles: int) -> Array:
            trace = self._replay(params, values, particles, Simulated(values))
            return log_joint(trace, self.layout)[0]

        def halves(params: Params) -> Array:
            every = joint(params, data | simulated, count)
            return every.reshape(2, count // 2, -1).mean(1)

        truth = lax.stop_gradient(jax.jacrev(lambda p: joint(p, data | latent, 1))(params))
        found = jax.jacrev(halves)(params)
        products = jax.tree.map(lambda g, t: ((g[0] - t) * (g[1] - t)).sum(), found, truth)
        return sum(jax.tree.leaves(products), jnp.zeros(())) / len(self.dreams.inputs)

    def _replay(
        self, params: Params, values: Params, particles: int, simulated: Simulated | None = None
    ) -> Trace:
        trace = self.phase.run(params, particles, self.layout.ndim - 1, values, simulated)
        return trace if simulated is None else simulated.restore(trace)

    @property
    def _names(self) -> list[str]:
        return [name for name in latents(self.dream) if name not in self.dreams.observed]

    def _latents(self, rng_key: Array, inputs: Array, simulator: Params) -> Params:
        """The simulator's draws, in the shapes of the model's sites.

        Raises:
            ValueError: other sites than the model's latents, or another shape; naming them.
        """
        count, wanted = self.simulator.num_particles, self._names
        shape: tuple[int, ...] = (count, len(inputs), self.simulator.noise_dim)
        noise = random.normal(rng_key, shape, inputs.dtype)
        draws = self.simulator.simulator.apply(simulator, inputs, noise)
        if not isinstance(draws, dict) or set(draws) != set(wanted):
            got = sorted(draws) if isinstance(draws, dict) else type(draws).__name__
            raise ValueError(
                f"the simulator must return the latent sites {sorted(wanted)} of the model, "
                f"got {got}."
            )
        found = {}
        for name in wanted:
            one = jnp.shape(self.dream[name]["value"])[1:]
            shape = (count, *one)
            given = jnp.shape(draws[name])
            if given[:1] != (count,) or jnp.size(draws[name]) != count * jnp.zeros(one).size:
                raise ValueError(
                    f"the simulator's values of latent site {name!r} have shape {given}; "
                    f"the site takes {shape}."
                )
            found[name] = draws[name].reshape(shape)
        return found
