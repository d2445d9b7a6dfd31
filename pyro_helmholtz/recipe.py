"""How to run one program again on the samples of an earlier trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine

from .layout import Layout
from .messengers import Detached, Dreaming, record
from .trace import Programs


@dataclass
class Recipe:
    """How to run one program again on the samples of an earlier trace.

    Attributes:
        program: "model" or "guide". args, kwargs: its arguments. values: of every sample.
        weights: of the particles, see ``Wake.weights``; None for dreams. layout: plates.
        observed: whether observed sites count. dreamt: the observed sites were dreamt too.
    """

    program: str
    args: tuple
    kwargs: dict[str, Any]
    values: dict[str, Any]
    weights: dict[tuple, torch.Tensor] | None
    layout: Layout
    observed: bool
    dreamt: bool = False

    @classmethod
    def of(cls, program: str, trace: poutine.Trace, *rest: Any, dreamt: bool = False) -> Recipe:
        """Take the sampled values of a trace; ``rest`` is (args, kwargs, weights, layout)."""
        args, kwargs, weights, layout = rest
        values = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        return cls(program, args, kwargs, values, weights, layout, program == "model", dreamt)

    def run(self, programs: Programs) -> poutine.Trace:
        """Run the program with the values replayed, at the present parameters."""
        samples = poutine.Trace()
        for name, value in self.values.items():
            samples.add_node(
                name, name=name, type="sample", is_observed=False, value=value, infer={}
            )
        fn = programs.model if self.program == "model" else programs.guide
        if self.dreamt:
            with Detached():
                return record(Dreaming()(fn), self.args, self.kwargs, samples)
        with programs.particles(self.layout.ndim - 1):
            return record(fn, self.args, self.kwargs, samples)
