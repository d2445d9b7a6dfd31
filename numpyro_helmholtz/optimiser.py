"""The host's optimiser: one state for all parameters, or one for each program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array

from .parameters import Params


@dataclass(frozen=True)
class Optimiser:
    """Ascend along directions.

    Args:
        host: an optimiser of ``numpyro.optim``. apart: the guide's parameters have a state of
            their own, so that a step can leave the model's velocity and counters alone.
    """

    host: Any
    apart: bool

    def init(self, params: Params, of_guide: frozenset[str]) -> Any:
        """The state before the first step.

        Args:
            params: unconstrained, by site name. of_guide: names of the guide's.
        """
        if not self.apart:
            return self.host.init(params)
        return {
            "guide": self.host.init({n: v for n, v in params.items() if n in of_guide}),
            "model": self.host.init({n: v for n, v in params.items() if n not in of_guide}),
        }

    def params(self, state: Any, program: str | None = None) -> Params:
        """Unconstrained values by site name, of all parameters or of the "guide" alone."""
        if not self.apart:
            return self.host.get_params(state)
        parts = [part for name, part in state.items() if program in (None, name)]
        return {n: v for part in parts for n, v in self.host.get_params(part).items()}

    def everything(self, state: Any) -> Any:
        """All that is optimised, a pytree; more than the programs' parameters in a subclass."""
        return self.params(state)

    def ascend(self, state: Any, direction: Params, loss: Array | None) -> Any:
        """One step; a program without a direction keeps its state."""
        downhill = jax.tree.map(jnp.negative, direction)
        if not self.apart:
            return self.host.update(downhill, state, value=loss)
        result = {}
        for program, part in state.items():
            names = self.params(state, program)
            moves = names and all(name in downhill for name in names)
            some = {name: downhill[name] for name in names if moves}
            result[program] = self.host.update(some, part, value=loss) if moves else part
        return result


def of_numpyro(optim: Any) -> Any:
    """An optimiser of ``numpyro.optim``, made from an optax transformation if need be.

    Raises:
        TypeError: anything else.
    """
    if isinstance(optim, numpyro.optim.Minimize):
        raise TypeError("numpyro.optim.Minimize takes a loss, not a direction; use SGD or Adam.")
    if all(callable(getattr(optim, name, None)) for name in ("init", "update", "get_params")):
        return optim
    if isinstance(optim, tuple) and all(hasattr(optim, name) for name in ("init", "update")):
        return numpyro.optim.optax_to_numpyro(optim)
    raise TypeError(
        "optim must be an optimiser of numpyro.optim or an optax transformation, got "
        f"{type(optim).__name__}. For example numpyro.optim.SGD(0.05)."
    )
