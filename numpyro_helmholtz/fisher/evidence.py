"""What a program says about the Fisher matrix: per site, the information of its arguments.

An *entry* is one group of a site's arguments with their information, multiplied by the weight
that each element carries in the expectation: the particle's weight, the datum's scale over
the number of data, the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from .. import graph
from ..checks import is_factor, stochastic_sites
from ..graph import Node
from ..layout import Layout, site_scale
from ..parameters import Params, parameters
from ..recipe import Recipe
from ..trace import Programs
from .arguments import argument_names, arguments, is_vector, other_values
from .families import Base, information, unwrap

Array = Any


@dataclass
class Entry:
    """Arguments of one site that inform together.

    Attributes:
        number: of the entry in its program. site: name. arguments: one, or several coupled
            ones: nodes where a parameter enters, else arrays.
        form: "scalar" (information in the argument's shape), "vector" (one more dimension
            than the argument), "coupled" (``(..., d, d)`` over d arguments), or "none": the
            parameters inform the site in a way that no information covers.
        information: weighted. exact: whether in closed form. how: where it comes from.
        error: what the family's rule refused, raised if a parameter enters.
    """

    number: int
    site: str
    arguments: list[Any]
    form: str
    information: Array
    exact: bool = True
    how: str = ""
    error: Exception | None = None

    @property
    def names(self) -> list[str]:
        """Names of the parameters that enter."""
        return sorted({n for x in self.arguments if isinstance(x, Node) for n in x.names})


def evidence(recipe: Recipe, programs: Programs, params: Params) -> list[Entry]:
    """All entries of a program run at ``params``, with plain arrays as arguments."""
    found: list[Entry] = []
    for name, site in stochastic_sites(recipe.run(programs, params)):
        if (site["is_observed"] and not recipe.observed) or is_factor(site["fn"]):
            continue  # a factor is no draw: it has no information
        for entry in _of_site(name, site, recipe):
            found.append(replace(entry, number=len(found)))
    return found


def entries(recipe: Recipe, programs: Programs, params: Params) -> list[Entry]:
    """The entries through which a parameter passes, their arguments recorded."""
    plain: list[Entry] = []

    def outputs(at: Params) -> list[Any]:
        plain[:] = evidence(recipe, programs, at)
        return [(entry.arguments, entry.information) for entry in plain]

    flat = iter(graph.record(outputs, parameters(params), params))
    recorded = []
    for entry in plain:
        given = [next(flat) for _ in entry.arguments]
        info = graph.value_of(next(flat))
        entry = replace(entry, arguments=given, information=info)
        if not entry.names:
            continue
        if entry.error is not None:
            raise entry.error
        recorded.append(_normalised(_moving(entry)))
    return recorded


def _of_site(name: str, site: dict[str, Any], recipe: Recipe) -> Iterator[Entry]:
    base = unwrap(site["fn"])
    given = arguments(base.fn, argument_names(base.fn))
    # A mixture's components, the distribution that another one truncates, and the like.
    within = other_values(base.fn, list(given)) if given else base.fn
    error = None
    try:
        info, exact, how = information(base.fn, recipe.key)
    except NotImplementedError as refused:
        info, exact, how = {}, False, ""
        error = NotImplementedError(f"site {name!r} of the {recipe.program}: {refused}")
        error.__cause__, within = refused, base.fn
    except ValueError as refused:
        raise ValueError(f"site {name!r} of the {recipe.program}: {refused}") from refused
    element = _element_weight(site, base, recipe.weights, recipe.layout)
    covered: set[str] = set()
    for key, value in info.items():
        keys = [key] if isinstance(key, str) else list(key)
        covered |= set(keys)
        chosen = [given[k] if k in given else jnp.asarray(getattr(base.fn, k)) for k in keys]
        vector = len(keys) == 1 and is_vector(base.fn, keys[0])
        form = "coupled" if len(keys) > 1 else "vector" if vector else "scalar"
        tail = chosen[0].shape[-1:] if vector else ()
        chosen = [_widen(x, (*base.fn.batch_shape, *tail)) for x in chosen]
        extra = 0 if form == "scalar" else 2
        weight = element.reshape(element.shape + (1,) * extra)
        full = (*base.fn.batch_shape, *value.shape[value.ndim - extra :])
        yield Entry(-1, name, chosen, form, jnp.broadcast_to(value * weight, full), exact, how)
    loose = [value for key, value in given.items() if key not in covered]
    loose += [x for x in jax.tree.leaves((base.transforms, within)) if _is_float(x)]
    if loose:
        nothing = jnp.zeros(())
        yield Entry(-1, name, loose, "none", nothing, False, "no Fisher information", error)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _widen(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else jnp.broadcast_to(x, shape)


def _moving(entry: Entry) -> Entry:
    """Coupled arguments without the constant ones."""
    if entry.form != "coupled":
        return entry
    kept = [i for i, x in enumerate(entry.arguments) if isinstance(x, Node)]
    arguments, info = [entry.arguments[i] for i in kept], entry.information
    if len(kept) == 1:
        info = info[..., kept[0], kept[0]]
        return replace(entry, arguments=arguments, form="scalar", information=info)
    if len(kept) < len(entry.arguments):
        info = jnp.stack([jnp.stack([info[..., i, j] for j in kept], -1) for i in kept], -2)
    return replace(entry, arguments=arguments, information=info)


def _normalised(entry: Entry) -> Entry:
    """Step from a vector to the one that it was normalised from (a softmax and its kin).

    With ``J`` the derivative of each vector by the other, the information is ``Jᵀ I J``.
    """
    while entry.form == "vector" and graph.simple_link(entry.arguments[0]) is None:
        link = graph.rowwise_link(entry.arguments[0])
        if link is None:
            break
        jacobian = link.jacobian()
        info = jnp.einsum("...ka,...kl,...lb->...ab", jacobian, entry.information, jacobian)
        entry = replace(entry, arguments=[link.foot], information=info)
    return entry


def _element_weight(
    site: dict[str, Any], base: Base, weights: Array | None, layout: Layout
) -> Array:
    """Weight of every batch element of the unwrapped distribution; broadcasts to its shape."""
    sizes, masks = _within(site["fn"], base.fn)

    def widen(value: Any, above: int = 0) -> Array:
        """An array over the batch and ``above`` of the sizes as one over the base's batch."""
        value = jnp.asarray(value)
        return value.reshape(value.shape + (1,) * (len(sizes) - above))

    batch = jnp.shape(site["value"])[: jnp.ndim(site["value"]) - len(site["fn"].event_shape)]
    element = widen(site_scale(site) / jnp.asarray(layout.num_data, _dtype(base.fn)))
    for mask, above in masks:
        if mask is not True:
            element = element * widen(mask, above)
    if weights is not None:
        element = element * widen(weights)
        batch = jnp.broadcast_shapes(batch, weights.shape)
    full = jnp.broadcast_shapes(batch, site["fn"].batch_shape) + sizes
    return _sum_to(element, jnp.broadcast_shapes(element.shape, full), base.fn.batch_shape)


def _within(fn: Any, base: Any) -> tuple[tuple[int, ...], list[tuple[Any, int]]]:
    """Sizes of the batch dimensions, at the right, that wrappers turn into an event.

    An expanded distribution may have smaller ones, or none; a transform may give the event
    another shape.

    Returns:
        The sizes, and the masks, each with the number of sizes that it stands above.
    """
    sizes: tuple[int, ...] = ()
    masks = []
    while fn is not base:
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(sizes)))
        sizes += tuple(fn.base_dist.batch_shape[len(fn.batch_shape) :])
        fn = fn.base_dist
    return sizes, masks


def _dtype(fn: Any) -> Any:
    return jnp.result_type(float, *arguments(fn, argument_names(fn)).values())


def _sum_to(x: Array, full: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """``x``, broadcast to ``full``, summed to what broadcasts to ``shape``."""
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    own = (1,) * (len(full) - len(shape)) + tuple(shape)
    count = 1
    axes = []
    for i, (n, m) in enumerate(zip(full, own, strict=True)):
        if n != m and x.shape[i] == n:
            axes.append(i)
        elif n != m:
            count *= n
    x = x.sum(tuple(axes), keepdims=True) * count
    return x.reshape(x.shape[x.ndim - len(shape) :])
