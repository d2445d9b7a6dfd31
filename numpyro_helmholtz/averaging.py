"""Means of the parameters over the updates (Polyak and Juditsky 1992).

Stochastic ascent at a constant rate ends in a cloud around the optimum, the wider the larger the
rate. The mean of the cloud is nearer to the optimum than any point of it, so that the rate may
stay large. ``get_params`` gives the means, which is what everybody reads; an update goes on from
the point where the last one ended, which the optimiser's state holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from .parameters import Params

WINDOW = 10


@partial(jax.tree_util.register_dataclass, data_fields=["means", "updates"], meta_fields=[])
@dataclass(frozen=True)
class Average:
    """The mean of every parameter's unconstrained value, of late updates above all; a pytree.

    ``x̄ ← x̄ + (x − x̄) w/(w + t)`` after t updates, with w = 10: polynomial-decay averaging
    (Shamir and Zhang 2013, section 4), in which about the last tenth of all updates counts.

    Attributes:
        means: unconstrained, by site name. updates: t.
    """

    means: Params
    updates: Array

    @classmethod
    def start(cls, params: Params) -> Average:
        """Before the first update."""
        return cls(params, jnp.zeros((), jnp.int32))

    def take_in(self, params: Params) -> Average:
        """With the parameters after one more update, unconstrained."""

        def moved(mean: Array, point: Array) -> Array:
            return mean + (point - mean) * WINDOW / (WINDOW + self.updates.astype(mean.dtype))

        return Average(jax.tree.map(moved, self.means, params), self.updates + 1)
