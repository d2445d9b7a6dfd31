"""What a trace's sites hold: parameters, log-densities, values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch.distributions import constraints

from .checks import check_log_prob_shape, is_stochastic
from .layout import Layout, Site
from .messengers import bernoulli_under


def stochastic_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Sample sites that carry probability: no subsample indices, no deterministic values."""
    for name, site in trace.nodes.items():
        if is_stochastic(site):
            yield name, site


def parameters(*traces: poutine.Trace) -> dict[str, torch.Tensor]:
    """The unconstrained leaf of every Pyro parameter that the traces use, by name.

    A leaf that has several names, as of a layer in two modules, stands here once: under the name
    that the host's store has for it, whichever of the names a trace uses.
    """
    store = pyro.get_param_store()
    leaves = {}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                value: Any = site["value"]
                leaf = value.unconstrained()
                if leaf.requires_grad:
                    leaves[store.param_name(leaf) or name] = leaf
    return leaves


def site_log_prob(site: Site) -> torch.Tensor:
    """Log-density of a site: unscaled, masked entries zero, shape = batch shape."""
    if "helmholtz_log_prob" not in site:
        fn, value = site["fn"], None
        quick = _has_quick_log_prob(fn, site["value"])
        if not quick or bernoulli_under(fn)._validate_args:
            try:
                value = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"site {site['name']!r}: {error}") from error
        if quick:  # where the host has validated too: the same number in every step
            value = _quick_log_prob(fn, site["value"])
        if site["mask"] is not None:
            value = scale_and_mask(value, 1.0, site["mask"])
        site["helmholtz_log_prob"] = value
    return site["helmholtz_log_prob"]


def _has_quick_log_prob(fn: Any, value: Any) -> bool:
    """Whether a site is Bernoulli with logits of its value's dtype."""
    base = bernoulli_under(fn)
    logits = None if base is None else base.__dict__.get("logits")
    if logits is None or logits is not base._param or not torch.is_tensor(value):
        return False
    return value.dtype == logits.dtype


def _quick_log_prob(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """The log-density of Bernoulli sites with logits: the host's, but for the passes over it.

    The sign is changed after the sum over the event, not before; of logits that particles share
    the normaliser is computed once.
    """
    logits, shape = bernoulli_under(fn).logits, fn.batch_shape + fn.event_shape
    event = tuple(range(-len(fn.event_shape), 0))
    few = _unexpanded(logits, len(event))
    if event and few is not logits and value.shape == shape:
        return (value * few).sum(event) + F.logsigmoid(-few).sum(event)
    if logits.shape != shape:
        logits = logits.expand(shape)
    if value.shape != shape:
        logits, value = torch.broadcast_tensors(logits, value)
    loss = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
    return -(loss.sum(event) if event else loss)


def _unexpanded(value: torch.Tensor, event_dim: int) -> torch.Tensor:
    """Without the copies along batch dimensions that ``expand`` made, as for particles."""
    for dim in range(value.ndim - event_dim):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value


@dataclass(slots=True)
class LogProb:
    """Log-densities of several sites, summed: those that differ in nothing that matters.

    Attributes:
        turn: of the sequential plates, see ``Layout.key``. scale: of each of the sites.
        value: unscaled, masked entries zero, batch-shaped.
    """

    turn: tuple
    scale: Any
    value: torch.Tensor


def log_probs(trace: poutine.Trace, layout: Layout, *, observed: bool = True) -> list[LogProb]:
    """The log-densities of a trace, summed over sites of equal turn, scale and shape.

    Args:
        trace: of a program. layout: of the model. observed: with observed sites.
    """
    sums: dict[tuple, LogProb] = {}
    for _, site in stochastic_sites(trace):
        if site["is_observed"] and not observed:
            continue
        value, scale, turn = site_log_prob(site), site["scale"], layout.key(site)
        check_log_prob_shape(site, value, layout.ndim)
        alike = id(scale) if torch.is_tensor(scale) else scale
        key = (turn, alike, value.shape, value.dtype, value.requires_grad)
        if key in sums:
            sums[key].value = sums[key].value + value
        else:
            sums[key] = LogProb(turn, scale, value)
    return list(sums.values())


def in_data_type(site: Site, observed: Any) -> torch.Tensor:
    """A dream in the type of its data: the host draws counts as floats, data may be integers.

    A dream that can be a fraction stays one: data of integers may have a continuous distribution.
    Whole numbers, but for bits, are as wide as torch has them: a dream may be larger than the data.
    """
    value: torch.Tensor = site["value"]
    if not torch.is_tensor(observed) or value.dtype == observed.dtype:
        return value
    if not (site["fn"].support.is_discrete or observed.is_floating_point()):
        return value
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if observed.is_floating_point() or support is constraints.boolean:
        return value.to(observed.dtype)
    return value.to(torch.int64)


def only_subsamples(trace: poutine.Trace) -> poutine.Trace:
    """The indices of the subsampled plates, to be replayed."""
    indices = poutine.Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample":
            indices.add_node(name, **site)
    return indices
