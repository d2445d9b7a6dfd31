"""What a trace says about the Fisher matrix: per site, the information of its arguments.

An *entry* is one group of a site's arguments with their information, multiplied by the weight
that each element carries in the expectation: the particle's weight, the datum's scale over
the number of data, the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .. import graph
from ..trace import Layout, site_log_prob, stochastic_sites
from .families import argument_names, constant_transforms, information, unwrap


@dataclass
class Entry:
    """Arguments of one site that inform together.

    Attributes:
        site: name. arguments: one tensor, or several coupled ones, graph alive.
        form: "scalar" (information in the argument's shape), "vector" (one more dimension
            than the argument), "coupled" (``(..., d, d)`` over d arguments), or "none": the
            parameters inform the site in a way that no information covers.
        information: weighted. exact: whether in closed form. how: where it comes from.
        leaves: names of the parameters that enter.
    """

    site: str
    arguments: list[Tensor]
    form: str
    information: Tensor
    exact: bool
    how: str
    leaves: list[str]


def entries(
    trace: poutine.Trace,
    weights: Mapping[tuple, Tensor] | None,
    layout: Layout,
    leaves: Mapping[int, str],
    *,
    observed: bool = True,
) -> Iterator[Entry]:
    """All entries of a trace through which a parameter passes.

    Args:
        trace: its graph alive. weights: per turn of the sequential plates, shape
            (K, data dimensions); None for 1. layout: of the model's trace.
        leaves: id of each parameter's leaf to its name. observed: with observed sites.
    """
    for name, site in stochastic_sites(trace):
        if site["is_observed"] and not observed:
            continue
        base = unwrap(site["fn"])
        names = argument_names(base.fn)
        below = {n: _names_below(getattr(base.fn, n), leaves) for n in names}
        if not any(below.values()) and constant_transforms(base.transforms):
            continue
        weight = None if weights is None else weights[layout.key(site)]
        info, exact, how = information(base.fn)
        covered: set[str] = set()
        element = _element_weight(site, base, weight, layout) if names else None
        for key, value in info.items():
            keys = [key] if isinstance(key, str) else list(key)
            covered |= set(keys)
            touched = list(dict.fromkeys(n for k in keys for n in below[k]))
            if not touched:
                continue
            arguments = [getattr(base.fn, k) for k in keys]
            if len(keys) > 1:
                moving = [i for i, k in enumerate(keys) if below[k]]
                arguments = [torch.broadcast_tensors(*arguments)[i] for i in moving]
                value = value[..., moving, :][..., moving]
                form = "coupled"
                if len(moving) == 1:
                    form, value = "scalar", value[..., 0, 0]
            else:
                form = "vector" if value.ndim == arguments[0].ndim + 1 else "scalar"
            assert element is not None
            weighted = value * element.reshape(element.shape + (1,) * (value.ndim - element.ndim))
            yield Entry(name, arguments, form, weighted, exact, how, touched)
        loose = [n for k in names if k not in covered for n in below[k]]
        loose += _in_transforms(base.transforms, leaves)
        if loose:
            nothing = torch.zeros(())
            yield Entry(name, [], "none", nothing, False, "no Fisher information", loose)


def _in_transforms(transforms: list[Any], leaves: Mapping[int, str]) -> list[str]:
    values = [v for t in transforms for v in vars(t).values() if torch.is_tensor(v)]
    return [name for value in values for name in _names_below(value, leaves)]


def _names_below(value: Tensor, leaves: Mapping[int, str]) -> list[str]:
    """Names of the parameters that a tensor depends on."""
    below = graph.leaves_below(graph.root_of(value))
    return [leaves[key] for key in below if key in leaves]


def _element_weight(site: dict[str, Any], base: Any, weight: Any, layout: Layout) -> Tensor:
    """Weight of every batch element of the unwrapped distribution."""
    inner = base.fn.batch_shape
    like = getattr(base.fn, argument_names(base.fn)[0]).detach()
    batch = site_log_prob(site).shape
    event = len(inner) - len(site["fn"].batch_shape)

    def widen(value: Any, at: int) -> Tensor:
        """A tensor over ``at`` batch dimensions as one over those of the innermost."""
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return value.reshape(value.shape + (1,) * (len(inner) - at))

    at = len(site["fn"].batch_shape)
    element = widen(site["scale"] / layout.num_data, at)
    for mask, place in [(site["mask"], at), *base.masks]:
        if mask is not None and mask is not True:
            element = element * widen(mask, place)
    if weight is not None:
        element = element * widen(weight, at)
        batch = _broadcast(batch, weight.shape)
    full = torch.Size(batch) + inner[len(inner) - event :] if event else torch.Size(batch)
    return element.expand(_broadcast(element.shape, full)).sum_to_size(inner)


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size:
    """As ``torch.broadcast_shapes``, without its overhead."""
    ndim = max(len(one), len(other))
    first = (1,) * (ndim - len(one)) + tuple(one)
    second = (1,) * (ndim - len(other)) + tuple(other)
    return torch.Size(b if a == 1 else a for a, b in zip(first, second, strict=True))
