"""The sleep phase of a model alone: one program, run on an update's arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine

from ..checks import PARTICLES, blame_data, check_sites
from ..layout import Layout
from ..messengers import Dreaming, record
from ..sites import stochastic_sites
from ..trace import Dream, Programs
from .sleep_set import check_dreams


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a method that has none."""


@dataclass(frozen=True)
class SleepPhase:
    """The model on the arguments of one update.

    Attributes:
        programs: the model. args, kwargs: its arguments.
    """

    programs: Programs
    args: tuple
    kwargs: dict[str, Any]

    def dream(self, particles: int) -> tuple[Dream, dict[str, Any], int]:
        """Run the model with so many particles.

        Returns:
            The dreams, the data by observed site, and the number of data that the model's
            plates separate.

        Raises:
            ValueError: a model that cannot dream, naming the site.
        """
        programs, dreaming = self.programs, Dreaming()
        programs.num_particles = particles
        with blame_data(programs.model, self.args, self.kwargs):
            nesting = programs.nesting(self.args, self.kwargs)
            with programs.validation("dream"), programs.particles(nesting), dreaming:
                trace = poutine.trace(programs.model).get_trace(*self.args, **self.kwargs)
        check_sites(trace, "model")
        check_dreams(trace, dreaming.observed)
        programs.validated.add("dream")
        sites = [site for _, site in stochastic_sites(trace)]
        layout = Layout.of(sites, nesting)
        sizes = {f.dim: f.size for f in sites[0]["cond_indep_stack"]}
        num_data = math.prod(sizes[dim] for dim in layout.shared)
        dream = Dream(trace, poutine.Trace(), self.args, self.kwargs, layout)
        return dream, dreaming.observed, num_data

    def replay(
        self, values: dict[str, Any], layout: Layout, particles: int, *, dreaming: bool
    ) -> poutine.Trace:
        """Run the model on given values of its sites.

        Args:
            values: by site. layout: of the model. particles: their number.
            dreaming: takes values of observed sites too; else these keep the data.
        """
        samples = poutine.Trace()
        for name, value in values.items():
            node = {"name": name, "type": "sample", "is_observed": False, "infer": {}}
            samples.add_node(name, **{**node, "value": value})
        fn = Dreaming()(self.programs.model) if dreaming else self.programs.model
        with pyro.plate(PARTICLES, particles, dim=-layout.ndim):
            return record(fn, self.args, self.kwargs, samples)
