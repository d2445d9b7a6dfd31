"""The arguments that a distribution was made with, and the same one with others."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array


def argument_names(fn: Any) -> list[str]:
    """Arguments that the distribution was made with and that are floating-point arrays."""
    found = []
    for name in fn.arg_constraints:
        value = fn.__dict__.get(name)
        if name == "mean" and isinstance(fn, dist.NegativeBinomial2):
            value = fn.mean  # kept as a rate
        if value is not None and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            found.append(name)
    return found


def event_dim(fn: Any, name: str) -> int:
    """Event dimensions of an argument; 0 where its constraint does not say."""
    try:
        return int(fn.arg_constraints[name].event_dim)
    except NotImplementedError:
        return 0


def is_vector(fn: Any, name: str) -> bool:
    """Whether the last dimension of an argument is one event, by its constraint or its shape."""
    return event_dim(fn, name) == 1 or jnp.ndim(getattr(fn, name)) > len(fn.batch_shape)


def arguments(fn: Any, names: list[str]) -> dict[str, Array]:
    """The arguments by name, as arrays."""
    return {name: jnp.asarray(getattr(fn, name)) for name in names}


def other_values(fn: Any, names: list[str]) -> dict[str, Any]:
    """What else the distribution was made with, such as a count or another distribution.

    Args:
        fn: the distribution. names: the arguments that are left out.
    """
    taken = set(inspect.signature(type(fn).__init__).parameters) | set(fn.arg_constraints)
    found: dict[str, Any] = {}
    for name in sorted(taken - {*names, "self", "validate_args"}):
        for own in (name, f"_{name}"):
            if own in fn.__dict__:
                found.setdefault(name, fn.__dict__[own])
    return found


def with_arguments(fn: Any, values: dict[str, Array]) -> Any:
    """The same distribution with other values of some arguments."""
    return type(fn)(**values, **other_values(fn, list(values)), validate_args=False)
