"""Pair dreams with the guide's arguments.

In the sleep phase the guide sees what the model dreamt. A dream replaces the argument that
*is* the observed value (the same object, also inside lists, named tuples, dictionaries and other
pytrees). For anything else the user gives ``dream_args``; a guide with ``observations=`` gets a
dictionary of the dreams by site, beside the arguments that identity found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array

Arrays = Mapping[str, Any]


class Observations(dict):
    """The dreams by site for a guide with ``observations=``; it notices what is read.

    Args:
        dreams: by site. needed: sites whose dreams reach the guide in no other way.
    """

    def __init__(self, dreams: Arrays = (), needed: Iterable[str] = ()) -> None:  # type: ignore[assignment]
        super().__init__(dreams)
        self.unread = set(needed)

    def __getitem__(self, name: str) -> Array:
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As ``dict.get``."""
        self.unread.discard(name)
        return super().get(name, default)

    def __iter__(self):
        self.unread.clear()
        return super().__iter__()

    def keys(self):
        """As ``dict.keys``; counts as reading all, since ``**`` asks for the keys."""
        self.unread.clear()
        return super().keys()

    def values(self):
        """As ``dict.values``."""
        self.unread.clear()
        return super().values()

    def items(self):
        """As ``dict.items``."""
        self.unread.clear()
        return super().items()

    def check(self) -> None:
        """Refuse a guide that has not looked at its dreams.

        Raises:
            ValueError: naming the site.
        """
        if self.unread:
            raise ValueError(
                f"the guide has a parameter observations= but ignores the dream of site "
                f"{min(self.unread)!r} there, so it would be trained on the real data under "
                "dreamt latents. Read observations[...] in the guide, observe the argument "
                "itself (obs=x), or give dream_args=fn(dreams, *args, **kwargs)."
            )


def pair_dreams(
    observed: Arrays,
    dreams: Arrays,
    args: tuple,
    kwargs: dict[str, Any],
    guide: Callable,
    dream_args: Callable | None,
) -> tuple[tuple, dict[str, Any], Observations]:
    """The guide's arguments with every observed value replaced by its dream.

    Args:
        observed: value of each observed site. dreams: what the model drew instead, in its type.
        args: the call's arguments. kwargs: its keyword arguments. guide: the program.
        dream_args: the user's own pairing, which takes precedence.

    Returns:
        Arguments and keyword arguments for the guide, and what to ``check`` when it has run.

    Raises:
        ValueError: an observed value that is no argument, naming the site.
    """
    if dream_args is not None:
        result = dream_args(dreams, *args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise ValueError(
                f"dream_args must return (args, kwargs) for the guide, got {type(result).__name__}."
            )
        return tuple(result[0]), dict(result[1]), Observations()

    signature = list(inspect.signature(guide).parameters)
    takes_observations = "observations" in signature
    by_identity: dict[int, str] = {}
    for name, value in observed.items():
        if id(value) in by_identity and not takes_observations:
            raise ValueError(
                f"sites {by_identity[id(value)]!r} and {name!r} observe the same object, so their "
                "dreams cannot be told apart. Give dream_args=fn(dreams, *args, **kwargs)."
            )
        by_identity[id(value)] = name
    new_args, new_kwargs, found = with_dreams(observed, dreams, args, kwargs)
    missing = sorted(set(observed) - found)
    if takes_observations:
        observations = Observations(dreams, missing)
        position = signature.index("observations")
        if position < len(args):
            new_args = (*new_args[:position], observations, *new_args[position + 1 :])
        else:
            new_kwargs["observations"] = observations
        return new_args, new_kwargs, observations
    if missing:
        raise ValueError(
            f"the observed value of site {missing[0]!r} is none of the arguments of the programs "
            "(the same object), so its dream cannot be handed to the guide. Observe the argument "
            "itself (obs=x), or give dream_args=fn(dreams, *args, **kwargs) -> (args, kwargs), or "
            "a guide with a parameter observations=."
        )
    return new_args, new_kwargs, Observations()


def with_dreams(
    observed: Arrays, dreams: Arrays, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any], set[str]]:
    """Arguments with every observed value replaced by its dream, and the sites found there."""
    by_identity = {id(value): name for name, value in observed.items()}
    found: set[str] = set()

    def is_observed(item: Any) -> bool:
        return id(item) in by_identity

    def replace(item: Any) -> Any:
        if not is_observed(item):
            return item
        name = by_identity[id(item)]
        found.add(name)
        return dreams[name]

    new_args, new_kwargs = jax.tree.map(replace, (args, kwargs), is_leaf=is_observed)
    return new_args, new_kwargs, found


def reads_its_data(site: str, observed: Iterable[str]) -> ValueError:
    """The error for a model that reads an argument that it observes, not the value it draws."""
    return ValueError(
        f"site {site!r} of the model depends on an argument that the model observes "
        f"({', '.join(map(repr, sorted(observed)))}). Dreams would follow from the real data "
        "there, beside the dreamt value that the guide sees. Use the value that numpyro.sample "
        "returns in place of the argument, or train without the sleep phase (sleep_weight=0)."
    )


def dreams_unread(sites: Iterable[str]) -> str:
    """The warning about guide sites that the sleep phase can only fit to the model's prior."""
    return (
        f"the guide's sites {sorted(sites)} follow neither the dreams of the data nor another "
        "site: the sleep phase fits them to the model's prior, whatever the data are. Let the "
        "guide read the observed argument itself, not a copy, or give dream_args; for a guide "
        "that is not amortised, train without the sleep phase (sleep_weight=0)."
    )
