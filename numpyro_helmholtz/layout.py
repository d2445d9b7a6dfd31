"""Which dimensions separate the data, and which scales the data carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from .checks import PARTICLES, stochastic_sites

Site = dict[str, Any]
Trace = Mapping[str, Site]
BOUNDED = (
    *(type(c) for c in (constraints.boolean, constraints.circular, constraints.simplex)),
    *(constraints.interval, constraints.integer_interval, constraints.multinomial),
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["num_data", "common_scale"],
    meta_fields=["shared", "ndim", "bounded", "partial"],
)
@dataclass(frozen=True)
class Layout:
    """Which plates separate the data, and how many data there are.

    Attributes:
        shared: dimension of each plate that all sites share, negative, in ascending order.
        ndim: number of batch dimensions, particles included.
        num_data: sum of the data's scales (the divisor of every direction). Plates that share no
            site with data, such as one of global latents, do not count.
        common_scale: the scale that the bound of a datum carries.
        bounded: whether all variables have a bounded support, as bits and categories have.
        partial: of a plate that is subsampled, though sites stand outside of it: what to say
            where weights are asked for; empty if there is none.
    """

    shared: tuple[int, ...]
    ndim: int
    num_data: Any
    common_scale: Any
    bounded: bool = True
    partial: str = ""

    @classmethod
    def of(cls, trace: Trace, max_plate_nesting: int) -> Layout:
        """Of one program's trace."""
        sites = [site for _, site in stochastic_sites(trace)]
        stacks = [
            {f.name: f for f in site["cond_indep_stack"] if f.name != PARTICLES} for site in sites
        ]
        names = set.intersection(*map(set, stacks)) if stacks else set()
        seen = set().union(*(stack for stack, s in zip(stacks, sites, strict=True) if _is_data(s)))
        with_data = [set(stack) for stack in stacks if seen.intersection(stack)]
        data_plates = set.intersection(*with_data) if with_data else set()
        frames = {name: frame for stack in stacks for name, frame in stack.items()}
        shared = tuple(sorted(frames[name].dim for name in names))

        def full_size(name: str) -> int:
            plate = trace.get(name)
            return plate["args"][0] if plate is not None else frames[name].size

        full: Any = math.prod(float(full_size(name)) for name in data_plates)
        subsample = math.prod(full_size(name) / frames[name].size for name in names)
        users = [users_scale(site) for site in sites]
        common: Any = subsample
        if users and all(same_scale(users[0], other) for other in users[1:]):
            common = subsample if _is_one(users[0]) else users[0] * subsample
            if names == data_plates and names and not _is_one(users[0]):
                full = full * jnp.mean(users[0])
        bounded = all(_is_bounded(site["fn"]) for site in sites)
        sizes = {name: (full_size(name), frame.size) for name, frame in frames.items()}
        partial = _partial(sites, stacks, names, sizes)
        return cls(shared, max_plate_nesting + 1, full, common, bounded, partial)

    def reduce(self, value: jax.Array) -> jax.Array:
        """Sum a batch-shaped array to one number per particle and datum, shape (K, data...)."""
        value = value.reshape((1,) * (self.ndim - value.ndim) + value.shape)
        keep = {self.ndim + dim for dim in self.shared} | {0}
        drop = tuple(d for d in range(self.ndim) if d not in keep)
        return value.sum(drop, keepdims=True) if drop else value

    def check_weights(self) -> None:
        """Refuse importance weights that a subsample cannot give.

        Raises:
            ValueError: a subsampled plate that does not hold all sites, naming it and one of them.
        """
        if self.partial:
            raise ValueError(
                f"{self.partial}: importance weights would be those of the subsample alone, as if "
                "there were no other data. Leave subsample_size out, or take StochasticBackprop, "
                "which scales the terms."
            )


def _partial(sites: list[Site], stacks: list[dict], names: set[str], sizes: dict) -> str:
    """What to say of a subsampled plate that not all sites share, or nothing.

    Args:
        sites: of a program. stacks: their plates. names: of those that all share.
        sizes: of each plate, in full and of the subsample.
    """
    for name in sorted(sizes.keys() - names):
        full, size = sizes[name]
        if size != full:
            outside = next(s for s, stack in zip(sites, stacks, strict=True) if name not in stack)
            return (
                f"plate {name!r} is subsampled ({size} of {full}), but site {outside['name']!r} "
                "stands outside of it"
            )
    return ""


def _is_data(site: Site) -> bool:
    """Whether a site is observed, or dreamt in place of what is observed."""
    return site["is_observed"] or "helmholtz_dream" in site


def _is_bounded(fn: Any) -> bool:
    """Whether a distribution's values lie between bounds; a factor has no values."""
    if 0 in fn.event_shape:
        return True
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(support, BOUNDED)


def site_scale(site: Site) -> Any:
    """The scale of a site: plates' and ``handlers.scale``'s together; 1.0 for none."""
    return 1.0 if site["scale"] is None else site["scale"]


def users_scale(site: Site) -> Any:
    """What ``handlers.scale`` contributes, without the plates."""
    scale = site.get("plate_to_scale", {}).get(None)
    return 1.0 if scale is None else scale


def _is_one(scale: Any) -> bool:
    return isinstance(scale, float | int) and scale == 1


def same_scale(one: Any, other: Any) -> bool:
    """Whether two scales are known to be the same; not of different tracers."""
    if one is other:
        return True
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=1e-9, atol=0))
