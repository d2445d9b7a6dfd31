"""The registry of Fisher informations of distributions in their own arguments.

``register_fisher(MyDistribution)`` decorates a function of one such distribution that returns
a dictionary. Its keys say which arguments, its values the information:

* ``"loc": tensor`` in the shape of the batch: each element informs about itself alone;
* ``"logits": tensor`` of shape ``(..., d, d)`` where the last dimension of the argument is none
  of the batch: it is one vector with this matrix;
* ``("concentration", "rate"): tensor`` of shape ``(..., d, d)``: ``d`` scalar arguments that
  are coupled element by element.

Two entries are orthogonal to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import is_vector

Information = dict[str | tuple[str, ...], Tensor]
Rule = Callable[[Any], Information]
R = TypeVar("R", bound=Rule)
_RULES: dict[type, Rule] = {}


def register_fisher(distribution: type) -> Callable[[R], R]:
    """Register the Fisher information of a distribution's arguments.

    Args:
        distribution: the class; subclasses with the same arguments inherit the rule.

    Returns:
        A decorator for a function ``rule(d) -> information`` (see the module's text).

    Raises:
        TypeError: ``distribution`` is not a class.
    """
    if not isinstance(distribution, type):
        raise TypeError(f"register_fisher needs a distribution class, got {distribution!r}.")

    def decorate(rule: R) -> R:
        _RULES[distribution] = rule
        return rule

    return decorate


def has_rule(fn: Any) -> bool:
    """Whether a rule is registered for the distribution's class or a base class of it."""
    return any(cls in _RULES for cls in type(fn).__mro__)


def by_rule(fn: Any, names: list[str]) -> Information | None:
    """By the registered rule of its class, or of a base class with the same arguments."""
    for cls in fn.__class__.__mro__:
        if cls not in _RULES:
            continue
        found = _RULES[cls](fn)
        keys = {name for key in found for name in ([key] if isinstance(key, str) else key)}
        if found and keys <= set(names):
            return _shaped(fn, found)
        known = set(fn.arg_constraints)
        if cls is fn.__class__ and not keys <= known:
            raise ValueError(
                f"the rule of {cls.__name__} informs about {sorted(keys)}, but its arguments are "
                f"{sorted(known)}."
            )
    return None


def _shaped(fn: Any, found: Information) -> Information:
    """What a rule says, in the shape of the batch.

    Raises:
        ValueError: it has another shape than its arguments give it.
    """
    result: Information = {}
    for key, value in found.items():
        size: tuple[int, ...] = () if isinstance(key, str) else (len(key),) * 2
        if isinstance(key, str) and is_vector(fn, key):
            size = tuple(getattr(fn, key).shape[-1:]) * 2
        expected, value = (*fn.batch_shape, *size), torch.as_tensor(value)
        try:
            result[key] = value if value.shape == expected else value.expand(expected)
        except RuntimeError:
            raise ValueError(
                f"the rule of {type(fn).__name__} gives {key!r} information of shape "
                f"{tuple(value.shape)}; with the batch {tuple(fn.batch_shape)} it has shape "
                f"{expected}."
            ) from None
    return result
