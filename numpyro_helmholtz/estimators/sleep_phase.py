"""The sleep phase of a model alone: one program, run on an update's arguments."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from ..checks import Trace, blame_data, check_observations, check_sites
from ..layout import Layout
from ..messengers import Dreaming
from ..parameters import Params
from ..trace import Programs
from .sleep_set import Drawable, check_dreams


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a method that has none."""


class ModelAlone(Programs):
    """A model without a guide; see ``Runner`` for the options."""

    def run(self, *args: Any, **kwargs: Any) -> Trace:
        """As ``Runner.run``.

        Raises:
            ValueError: a site that cannot be drawn, naming it.
        """
        with Drawable():
            return super().run(*args, **kwargs)

    def check(self, guide: Trace, model: Trace) -> None:
        """Refuse structure that cannot be trained.

        Raises:
            ValueError: naming the site.
        """
        check_sites(model, "model")
        check_observations(model)
        check_dreams(model)


@dataclass(frozen=True)
class SleepPhase:
    """The model on the arguments of one update.

    Attributes:
        programs: the model. rng_key: of its draws. args, kwargs: its arguments.
        mutable: state of mutable sites. samples: dreams to take instead of drawn ones, by site.
    """

    programs: Programs
    rng_key: Array
    args: tuple
    kwargs: dict[str, Any]
    mutable: Params | None = None
    samples: Params | None = None

    def dream(self, params: Params, count: int | None) -> tuple[Trace, dict[str, Any], Layout]:
        """Run the model with as many particles as ``count`` dreams take; None is one particle.

        Returns:
            The trace, the data by observed site, and the plates.

        Raises:
            ValueError: a model that cannot dream, naming the site.
        """
        with blame_data(self.args, self.kwargs):
            nesting = self._nesting(params)
            particles = 1 if count is None else -(-count // self._num_data(params, nesting))
            dreaming = Dreaming()
            trace = self.run(params, particles, nesting, self.samples, dreaming)
        return trace, dreaming.observed, Layout.of(trace, nesting)

    def run(
        self,
        params: Params,
        particles: int | None,
        nesting: int,
        values: Params | None = None,
        dreaming: Dreaming | None = None,
    ) -> Trace:
        """Run the model.

        Args:
            params: by name. particles: their number, or None for no dimension of particles.
            nesting: number of plate dimensions. values: of sites, to take instead of draws.
            dreaming: draws the observed sites too; None leaves them as they are.
        """
        programs = copy.copy(self.programs)
        programs.num_particles = 1 if particles is None else particles
        return programs.run(
            programs.model,
            self.rng_key,
            params,
            self.args,
            self.kwargs,
            values=values,
            mutable=self.mutable,
            particles=None if particles is None else -1 - nesting,
            dreaming=dreaming,
        )

    def _nesting(self, params: Params) -> int:
        return self.programs.nesting(
            self.rng_key, params, self.args, self.kwargs, mutable=self.mutable
        )

    def _num_data(self, params: Params, nesting: int) -> int:
        """The number of data that the model's plates separate, from its shapes alone."""
        found = []

        def look(params: Params) -> None:
            trace = self.run(params, None, nesting)
            layout = Layout.of(trace, nesting)
            site = next(s for s in trace.values() if s["type"] == "sample")
            sizes = {f.dim: f.size for f in site["cond_indep_stack"]}
            found.append(math.prod(sizes[dim] for dim in layout.shared))

        jax.eval_shape(look, params)
        return found[0]
