"""Pair dreams with the guide's arguments.

In the sleep phase the guide sees what the model dreamt. A dream replaces the argument that
*is* the observed value (the same object, also inside lists, tuples and dictionaries). For
anything else the user gives ``dream_args``; a guide with ``observations=`` gets a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


def pair_dreams(
    observed: Tensors,
    dreams: Tensors,
    args: tuple,
    kwargs: dict[str, Any],
    dream_args: Callable | None,
    takes_observations: bool,
) -> tuple[tuple, dict[str, Any]]:
    """The guide's arguments with every observed value replaced by its dream.

    Args:
        observed: value of each observed site. dreams: what the model drew instead.
        args: the call's arguments. kwargs: its keyword arguments.
        dream_args: the user's own pairing, which takes precedence.
        takes_observations: whether the guide has a parameter ``observations``.

    Returns:
        Arguments and keyword arguments for the guide.

    Raises:
        ValueError: an observed value that is no argument, naming the site.
    """
    dreams = {name: _like(dream, observed[name]) for name, dream in dreams.items()}
    if dream_args is not None:
        result = dream_args(dreams, *args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise ValueError(
                "dream_args must return (args, kwargs) for the guide, got "
                f"{type(result).__name__}."
            )
        return tuple(result[0]), dict(result[1])
    if takes_observations:
        return args, {**kwargs, "observations": dict(dreams)}

    by_identity: dict[int, str] = {}
    for name, value in observed.items():
        if id(value) in by_identity:
            raise ValueError(
                f"sites {by_identity[id(value)]!r} and {name!r} observe the same object, so their "
                "dreams cannot be told apart. Give dream_args=fn(dreams, *args, **kwargs)."
            )
        by_identity[id(value)] = name
    found: set[str] = set()

    def replace(item: Any) -> Any:
        if id(item) in by_identity:
            name = by_identity[id(item)]
            found.add(name)
            return dreams[name]
        if isinstance(item, Mapping):
            return {key: replace(value) for key, value in item.items()}
        if type(item) in (list, tuple):
            return type(item)(replace(value) for value in item)
        return item

    new_args = tuple(replace(arg) for arg in args)
    new_kwargs = {key: replace(value) for key, value in kwargs.items()}
    missing = sorted(set(observed) - found)
    if missing:
        raise ValueError(
            f"the observed value of site {missing[0]!r} is none of the arguments of the programs "
            "(the same object), so its dream cannot be handed to the guide. Observe the argument "
            "itself (obs=x), or give dream_args=fn(dreams, *args, **kwargs) -> (args, kwargs), or "
            "a guide with a parameter observations=."
        )
    return new_args, new_kwargs


def _like(dream: torch.Tensor, observed: Any) -> torch.Tensor:
    return dream.to(observed.dtype) if torch.is_tensor(observed) else dream
