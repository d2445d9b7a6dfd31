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
            than the argument) or "coupled" (``(..., d, d)`` over d arguments).
        information: weighted. exact: whether in closed form. how: where it comes from.
    """

    site: str
    arguments: list[Tensor]
    form: str
    information: Tensor
    exact: bool
    how: str


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
        if not any(
            graph.root_of(getattr(base.fn, arg)) is not None for arg in argument_names(base.fn)
        ):
            continue
        weight = None if weights is None else weights[layout.key(site)]
        element = _element_weight(site, base, weight, layout)
        info, exact, how = information(base.fn)
        for key, value in info.items():
            keys = [key] if isinstance(key, str) else list(key)
            arguments = [getattr(base.fn, k) for k in keys]
            if not any(_touched(a, leaves) for a in arguments):
                continue
            if len(keys) > 1:
                form = "coupled"
                arguments = list(torch.broadcast_tensors(*arguments))
            elif value.ndim == arguments[0].ndim + 1:
                form = "vector"
            else:
                form = "scalar"
            weighted = value * element.reshape(element.shape + (1,) * (value.ndim - element.ndim))
            yield Entry(name, arguments, form, weighted, exact, how)


def uncovered(trace: poutine.Trace, leaves: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
    """Leaves that inform a site otherwise than through covered arguments, with the site."""
    for name, site in stochastic_sites(trace):
        base = unwrap(site["fn"])
        covered: set[str] = set()
        if argument_names(base.fn):
            info = information(base.fn)[0]
            for key in info:
                covered |= {key} if isinstance(key, str) else set(key)
        loose = [getattr(base.fn, n) for n in argument_names(base.fn) if n not in covered]
        if not constant_transforms(base.transforms):
            loose += [
                value
                for transform in base.transforms
                for value in vars(transform).values()
                if torch.is_tensor(value)
            ]
        for value in loose:
            for key, leaf in graph.leaves_below(graph.root_of(value)).items():
                if key in leaves:
                    yield name, leaf


def _touched(argument: Tensor, leaves: Mapping[int, str]) -> bool:
    return any(key in leaves for key in graph.leaves_below(graph.root_of(argument)))


def _element_weight(site: dict[str, Any], base: Any, weight: Any, layout: Layout) -> Tensor:
    """Weight of every batch element of the unwrapped distribution."""
    inner = base.fn.batch_shape
    like = getattr(base.fn, argument_names(base.fn)[0]).detach()
    batch = site_log_prob(site).shape
    event = len(inner) - len(site["fn"].batch_shape)

    def widen(value: Any, at: int) -> Tensor:
        """A tensor over ``at`` batch dimensions as one over those of the innermost."""
        value = torch.as_tensor(value, device=like.device).to(like.dtype)
        return value.reshape(value.shape + (1,) * (len(inner) - at))

    at = len(site["fn"].batch_shape)
    element = widen(site["scale"] / layout.num_data, at)
    for mask, place in [(site["mask"], at), *base.masks]:
        if mask is not None and mask is not True:
            element = element * widen(mask, place)
    if weight is not None:
        element = element * widen(weight, at)
        batch = torch.broadcast_shapes(batch, weight.shape)
    full = batch + inner[len(inner) - event :] if event else batch
    return element.expand(torch.broadcast_shapes(element.shape, full)).sum_to_size(inner)
