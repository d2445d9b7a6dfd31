"""Which plates separate the data, and how many data there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import constraints

from .checks import PARTICLES

Site = Any
BOUNDED = (
    *(type(c) for c in (constraints.boolean, constraints.one_hot, constraints.simplex)),
    *(constraints.interval, constraints.integer_interval, constraints.multinomial),
)


@dataclass
class Layout:
    """Which plates separate the data, and how many data there are.

    Attributes:
        shared: dimension of each vectorised plate that all sites share.
        sequential: names of the sequential plates that all sites share.
        ndim: number of batch dimensions, particles included.
        num_data: sum of the data's scales (the divisor of every direction). Plates that share no
            site with data, such as one of global latents, do not count.
        common_scale: the scale that the bound of a datum carries.
        bounded: whether all variables have a bounded support, as bits and categories have.
        partial: of a plate that is subsampled, though sites stand outside of it: what to say
            where weights are asked for; empty if there is none.
    """

    shared: tuple[int, ...]
    sequential: tuple[str, ...]
    ndim: int
    num_data: float
    common_scale: Any
    bounded: bool = True
    partial: str = ""

    @classmethod
    def of(cls, sites: list[Site], max_plate_nesting: int) -> Layout:
        """Of the sites of one program."""
        stacks = [
            {f.name: f for f in site["cond_indep_stack"] if f.name != PARTICLES} for site in sites
        ]
        names = set.intersection(*map(set, stacks)) if stacks else set()
        seen = set().union(*(stack for stack, s in zip(stacks, sites, strict=True) if _is_data(s)))
        with_data = [set(stack) for stack in stacks if seen.intersection(stack)]
        data_plates = set.intersection(*with_data) if with_data else set()
        frames = {name: frame for stack in stacks for name, frame in stack.items()}
        shared = tuple(sorted(frames[n].dim for n in names if frames[n].vectorized))
        sequential = tuple(sorted(n for n in names if not frames[n].vectorized))

        scales = [site["scale"] for site in sites]
        full = math.prod(float(frames[n].full_size or frames[n].size) for n in data_plates)
        subsample = math.prod(
            (frames[n].full_size or frames[n].size) / frames[n].size for n in names
        )
        common = scales[0] if scales and _all_equal(scales) else subsample
        if names == data_plates and names:
            ratio = common / subsample
            full = full * float(ratio.mean() if torch.is_tensor(ratio) else ratio)
        bounded = all(_is_bounded(site["fn"]) for site in sites)
        sizes = {name: (f.full_size or f.size, f.size) for name, f in frames.items()}
        partial = _partial(sites, stacks, names, sizes)
        full = max(full, 1e-30)
        return cls(shared, sequential, max_plate_nesting + 1, full, common, bounded, partial)

    def key(self, site: Site) -> tuple:
        """Which turn of the shared sequential plates a site belongs to."""
        if not self.sequential:
            return ()
        counters = {f.name: f.counter for f in site["cond_indep_stack"]}
        return tuple(counters[name] for name in self.sequential)

    def reduce(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a batch-shaped tensor to one number per particle and datum."""
        if value.ndim < self.ndim:
            value = value.reshape((1,) * (self.ndim - value.ndim) + value.shape)
        if len(self.shared) + 1 == self.ndim:
            return value
        keep = {self.ndim + dim for dim in self.shared} | {0}
        drop = [d for d in range(self.ndim) if d not in keep]
        return value.sum(drop, keepdim=True) if drop else value

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


def _all_equal(scales: list[Any]) -> bool:
    first = scales[0]
    for other in scales[1:]:
        if other is first:
            continue
        if torch.is_tensor(first) or torch.is_tensor(other):
            if not (
                torch.is_tensor(first) and torch.is_tensor(other) and torch.equal(first, other)
            ):
                return False
        elif abs(first - other) > 1e-9 * abs(first):
            return False
    return True
