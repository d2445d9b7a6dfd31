"""The arguments that a distribution was made with, and the same one with others."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


def argument_names(fn: Any) -> list[str]:
    """Arguments that the distribution was made with and that are floating-point tensors.

    Probabilities computed from logits (or the reverse) and kept are not among them.
    """
    if isinstance(fn, torch.distributions.Beta | dist.BetaBinomial):
        return ["concentration1", "concentration0"]  # views of a Dirichlet's argument
    if isinstance(fn, dist.DirichletMultinomial):
        return ["concentration"]  # that of a Dirichlet
    if isinstance(fn, dist.GammaPoisson):
        return ["concentration", "rate"]  # those of a Gamma
    if isinstance(fn, torch.distributions.HalfNormal | torch.distributions.HalfCauchy):
        return ["scale"]  # that of a whole distribution
    if isinstance(fn, dist.ZeroInflatedPoisson):
        gate = next(name for name in fn.__dict__ if name in ("gate", "gate_logits"))  # as given
        return [gate, "rate"]
    held = getattr(fn, "_categorical", fn).__dict__
    given = held.get("_param")
    names = []
    for name in fn.arg_constraints:
        value = held.get(name)
        if name in ("probs", "logits") and given is not None and value is not given:
            continue
        if torch.is_tensor(value) and value.is_floating_point():
            names.append(name)
    return names


def event_dim(fn: Any, name: str) -> int:
    """Event dimensions of an argument; 0 where its constraint does not say."""
    try:
        return int(fn.arg_constraints[name].event_dim)
    except NotImplementedError:
        return 0


def is_vector(fn: Any, name: str) -> bool:
    """Whether the last dimension of an argument is one event, by its constraint or its shape."""
    return event_dim(fn, name) == 1 or getattr(fn, name).ndim > len(fn.batch_shape)


def inner_tensors(fn: Any, *others: str) -> list[Tensor]:
    """Tensors of the distributions that one was made with, such as a mixture's components.

    Args:
        fn: the distribution. others: further names under which it may hold such a one.
    """
    held = fn.__dict__
    found: list[Tensor] = []
    for name in dict.fromkeys((*_constructor_names(fn.__class__), *others)):
        for value in (held.get(name), held.get("_" + name)):
            if isinstance(value, torch.distributions.Distribution):
                found += _all_tensors(value)
    return found


def _all_tensors(fn: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(fn).values():
        if torch.is_tensor(value):
            found.append(value)
        elif isinstance(value, torch.distributions.Distribution):
            found += _all_tensors(value)
    return found


@functools.cache
def _constructor_names(cls: Any) -> tuple[str, ...]:
    """What a distribution's constructor takes, in order."""
    names = inspect.signature(cls.__init__).parameters
    return tuple(name for name in names if name not in ("self", "validate_args"))


def with_arguments(fn: Any, values: dict[str, Tensor]) -> Any:
    """The distribution with other values of its arguments.

    Raises:
        NotImplementedError: its constructor does not take them again.
    """
    either = {"probs", "logits"} if values.keys() & {"probs", "logits"} else set()
    skipped = values.keys() | either
    taken = [name for name in _constructor_names(fn.__class__) if name not in skipped]
    others = {name: getattr(fn, name) for name in taken if hasattr(fn, name)}
    try:
        return type(fn)(**values, **others)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(fn).__name__} has no registered Fisher information, and it cannot be made "
            f"again from its arguments {list(values)} ({error}). Give one by @register_fisher."
        ) from error
