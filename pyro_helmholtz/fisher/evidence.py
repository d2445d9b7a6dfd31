"""What a trace says about the Fisher matrix: per site, the information of its arguments.

An *entry* is one group of a site's arguments with their information, multiplied by the weight
that each element carries in the expectation: the particle's weight, the datum's scale over
the number of data, the mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from torch import Tensor

from ..finder import Finder, Use
from ..layout import Layout
from ..sites import site_log_prob, stochastic_sites
from .arguments import argument_names, event_dim, inner_tensors
from .families import Base, constant_transforms, information, unwrap
from .registry import has_rule


@dataclass(slots=True)
class Entry:
    """Arguments of one site that inform together.

    Attributes:
        site: name. taken: per argument, the finder's key and the use of parameters in it.
        form: "scalar" (information in the argument's shape), "vector" (one more dimension
            than the argument), "coupled" (``(..., d, d)`` over d arguments), or "none": the
            parameters inform the site in a way that no information covers.
        information: weighted. exact: whether in closed form. how: where it comes from.
        loose: names of the parameters that enter elsewhere, for the form "none".
    """

    site: str
    taken: list[tuple[Hashable, Use]]
    form: str
    information: Tensor
    exact: bool
    how: str
    loose: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[Tensor]:
        """The arguments, their graphs alive."""
        return [use.argument for _, use in self.taken]

    @property
    def names(self) -> list[str]:
        """Names of all parameters that enter."""
        return list(dict.fromkeys([n for _, use in self.taken for n in use.names] + self.loose))


def entries(
    trace: poutine.Trace,
    weights: Mapping[tuple, Tensor] | None,
    layout: Layout,
    finder: Finder,
    *,
    observed: bool = True,
) -> Iterator[Entry]:
    """All entries of a trace through which a parameter passes.

    Args:
        trace: its graph alive. weights: per turn of the sequential plates, shape
            (K, data dimensions); None for 1. layout: of the model's trace.
        finder: knows the parameters. observed: with observed sites.
    """
    program = "model" if observed else "guide"
    known: dict[tuple, Tensor] = {}
    for name, site in stochastic_sites(trace):
        if (site["is_observed"] and not observed) or isinstance(site["fn"], Unit):
            continue  # a factor is no draw: it has no information
        base = unwrap(site["fn"])
        names = argument_names(base.fn)
        uses = {n: finder.use((program, name, n), _widened(base.fn, n)) for n in names}
        others = () if has_rule(base.fn) else ("base_dist",)  # which a rule looks into itself
        inner = [value for value in inner_tensors(base.fn, *others) if value.requires_grad]
        constant = not inner and constant_transforms(base.transforms)
        if constant and not any(use.names for use in uses.values()):
            continue
        weight = None if weights is None else weights[layout.key(site)]
        try:
            info, exact, how = information(base.fn, names)
        except NotImplementedError as error:
            if any(use.names for use in uses.values()):
                raise NotImplementedError(f"site {name!r} of the {program}: {error}") from error
            info, exact, how = {}, False, ""  # no parameter enters there
        except ValueError as error:
            raise ValueError(f"site {name!r} of the {program}: {error}") from error
        covered: set[str] = set()
        element = None
        if names:
            element = _known_weight(known, site, base, weight, layout)
        for key, value in info.items():
            keys = [key] if isinstance(key, str) else list(key)
            covered |= set(keys)
            if not any(uses[k].names for k in keys):
                continue
            assert element is not None
            extra = value.ndim - len(base.fn.batch_shape)
            weighted = value * (element.reshape(element.shape + (1,) * extra) if extra else element)
            taken: list[tuple[Hashable, Use]] = [((program, name, k), uses[k]) for k in keys]
            if len(keys) > 1:
                taken, weighted = _coupled(taken, weighted, finder)
            form = "coupled" if len(taken) > 1 else "scalar"
            if form == "scalar" and weighted.ndim > len(base.fn.batch_shape):
                form = "vector"
            yield Entry(name, taken, form, weighted, exact, how)
        loose = [n for k in names if k not in covered for n in uses[k].names]
        loose += _in_transforms(base.transforms, finder)
        loose += [n for i, v in enumerate(inner) for n in finder.use((name, "inner", i), v).names]
        if loose:
            yield Entry(name, [], "none", torch.zeros(()), False, "no Fisher information", loose)


def _widened(fn: Any, name: str) -> Tensor:
    """An argument in the shape of the batch: a user's distribution may hold a smaller one."""
    value, batch = getattr(fn, name), fn.batch_shape
    if value.shape[: len(batch)] == batch:
        return value
    try:
        return value.expand(*batch, *value.shape[value.ndim - event_dim(fn, name) :])
    except RuntimeError:  # no element of it belongs to one of the batch
        return value


def _coupled(
    taken: list[tuple[Hashable, Use]], value: Tensor, finder: Finder
) -> tuple[list[tuple[Hashable, Use]], Tensor]:
    """The arguments that parameters enter, broadcast together, and their information."""
    wide = torch.broadcast_tensors(*(use.argument for _, use in taken))
    moving = [i for i, (_, use) in enumerate(taken) if use.names]
    keys: list[Hashable] = [("broadcast", taken[i][0]) for i in moving]
    taken = [(key, finder.use(key, wide[i])) for key, i in zip(keys, moving, strict=True)]
    value = value[..., moving, :][..., moving]
    return taken, (value[..., 0, 0] if len(moving) == 1 else value)


def _in_transforms(transforms: list[Any], finder: Finder) -> list[str]:
    values = [v for t in transforms for v in vars(t).values() if torch.is_tensor(v)]
    return [n for i, v in enumerate(values) for n in finder.use(("transform", i), v).names]


def _known_weight(
    known: dict[tuple, Tensor], site: dict[str, Any], base: Base, weight: Any, layout: Layout
) -> Tensor:
    """``_element_weight``, computed once for sites that differ in their event alone."""
    if torch.is_tensor(site["scale"]) or site["mask"] is not None or base.masks:
        return _element_weight(site, base, weight, layout)
    inner, (sizes, _) = base.fn.batch_shape, _within(site["fn"], base.fn)
    outer = max(len(inner) - len(sizes), 0)
    if inner[outer:] != sizes:  # expanded: the weight counts how often each element is used
        return _element_weight(site, base, weight, layout)
    key = (layout.key(site), site["scale"], site_log_prob(site).shape, inner[:outer], len(sizes))
    if key in known:
        return known[key]
    element = _element_weight(site, base, weight, layout)
    if all(size == 1 for size in element.shape[max(element.ndim - len(sizes), 0) :]):
        known[key] = element
    return element


def _element_weight(site: dict[str, Any], base: Base, weight: Any, layout: Layout) -> Tensor:
    """Weight of every batch element of the unwrapped distribution; broadcasts against them."""
    sizes, masks = _within(site["fn"], base.fn)
    batch = site_log_prob(site)

    def widen(value: Tensor, above: int = 0) -> Tensor:
        """A tensor over the batch and ``above`` of the sizes as one over the innermost's batch."""
        return value.reshape(value.shape + (1,) * (len(sizes) - above))

    element: Any = site["scale"] / layout.num_data
    if torch.is_tensor(element):
        element = widen(element.to(batch))
    for mask, above in [(site["mask"], 0), *masks]:
        if torch.is_tensor(mask):
            element = element * widen(mask.to(batch), above)
        elif mask is False:
            element = element * 0.0
    shape = batch.shape
    if weight is not None:
        element = element * widen(weight)
        shape = _broadcast(shape, weight.shape)
    full = shape + sizes
    if not torch.is_tensor(element):
        element = batch.detach().new_tensor(element)
    if full == base.fn.batch_shape:
        return element
    return element.expand(_broadcast(element.shape, full)).sum_to_size(base.fn.batch_shape)


def _within(fn: Any, base: Any) -> tuple[torch.Size, list[tuple[Any, int]]]:
    """Sizes of the batch dimensions, at the right, that wrappers turn into an event.

    An expanded distribution may have smaller ones, or none; a transform may give the event
    another shape.

    Returns:
        The sizes, and the masks, each with the number of sizes that it stands above.
    """
    sizes = torch.Size()
    masks = []
    while fn is not base:
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, len(sizes)))
        sizes = torch.Size(sizes + fn.base_dist.batch_shape[len(fn.batch_shape) :])
        fn = fn.base_dist
    return sizes, masks


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size:
    """As ``torch.broadcast_shapes``, without its overhead."""
    ndim = max(len(one), len(other))
    first = (1,) * (ndim - len(one)) + tuple(one)
    second = (1,) * (ndim - len(other)) + tuple(other)
    return torch.Size(b if a == 1 else a for a, b in zip(first, second, strict=True))
