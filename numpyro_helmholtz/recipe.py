"""How to run a program again on the samples of an earlier trace, as a pytree.

A recipe can live in the state of an optimisation, under ``jit`` and ``lax.scan``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array

from .arguments import Arguments
from .checks import Trace
from .layout import Layout
from .trace import Dream, Params, Programs, Wake, sampled_values


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "weights", "arguments", "key", "mutable", "layout"],
    meta_fields=["program", "observed", "dreamt"],
)
@dataclass(frozen=True)
class Recipe:
    """How to run one program again on the samples of an earlier trace.

    Attributes:
        program: "model" or "guide". observed: whether observed sites count.
        dreamt: whether observed sites were dreamt, too; then there are no particles.
        values: of every sample and of subsampled plates' indices, by name.
        weights: of the particles, (K, data dimensions...), see ``Wake.weights``; None for 1.
        arguments: of the program, ``(args, kwargs)``. key: of its draws that no site records.
        mutable: state of mutable sites. layout: plates and scales.
    """

    program: str
    observed: bool
    dreamt: bool
    values: dict[str, Array]
    weights: Array | None
    arguments: Arguments
    key: Array
    mutable: Params
    layout: Layout

    @classmethod
    def of_wake(
        cls, program: str, wake: Wake, weights: Array, args: tuple, kwargs: Mapping[str, Any]
    ) -> Recipe:
        """Of "model" or "guide" on the wake phase's particles."""
        at = program == "model"
        trace = wake.model if at else wake.guide
        return cls(
            program,
            at,
            False,
            sampled_values(trace),
            weights,
            Arguments.of((args, dict(kwargs))),
            wake.keys[at],
            wake.states[at],
            wake.layout,
        )

    @classmethod
    def of_dream(
        cls,
        program: str,
        dream: Dream,
        args: tuple,
        kwargs: Mapping[str, Any],
        mutable: Params | None = None,
    ) -> Recipe:
        """Of "model" or "guide" on dreams.

        Args:
            args: what the program was called with: ``dream.args`` for the guide, the data's
                own for the model. kwargs: likewise. mutable: state of mutable sites.
        """
        at = program == "model"
        trace = dream.model if at else dream.guide
        return cls(
            program,
            at,
            True,
            sampled_values(trace),
            None,
            Arguments.of((args, dict(kwargs))),
            dream.keys[at],
            mutable or {},
            dream.layout,
        )

    @property
    def args(self) -> tuple:
        """Positional arguments of the program."""
        return self.arguments.rebuilt()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the program."""
        return self.arguments.rebuilt()[1]

    def run(self, programs: Programs, params: Params) -> Trace:
        """Run the program with the values replayed, at any parameters; differentiable."""
        args, kwargs = self.arguments.rebuilt()
        return programs.again(
            self.program,
            self.key,
            params,
            args,
            kwargs,
            self.values,
            mutable=self.mutable,
            particles=None if self.dreamt else -self.layout.ndim,
            dreamt=self.dreamt,
        )
