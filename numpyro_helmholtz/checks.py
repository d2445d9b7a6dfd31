"""What is refused, and how it is said: every error names the site.

Structure (sites, plates, supports, shapes) is checked whenever the programs are traced, also
inside ``jit``. What depends on values (NaN data, values outside a support) is counted there as
well, and raised outside of it, where the counts are concrete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from .parameters import parameters
from .record import Node, record

Site = dict[str, Any]
Trace = Mapping[str, Site]
PARTICLES = "num_particles_vectorized"


def stochastic_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Sample sites, the ones that carry probability, in their order."""
    for name, site in trace.items():
        if site["type"] == "sample":
            yield name, site


def latents(trace: Trace) -> dict[str, Site]:
    """The sites that were sampled, not observed."""
    return {name: site for name, site in stochastic_sites(trace) if not site["is_observed"]}


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _support(site: Site) -> Any:
    """The support of a site's elements, whatever of them makes an event."""
    support = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def is_factor(fn: Any) -> bool:
    """Whether a site is a ``numpyro.factor``."""
    return isinstance(_innermost(fn), dist.Unit)


def _declares_support(fn: Any) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn.support is not None


def check_sites(trace: Trace, program: str) -> None:
    """Refuse enumeration marks, and distributions that do not say where their values lie.

    Raises:
        ValueError: naming the site and the program it stands in.
    """
    for name, site in stochastic_sites(trace):
        if not _declares_support(site["fn"]):
            kind = type(_innermost(site["fn"])).__name__
            raise ValueError(
                f"site {name!r} of the {program}: {kind} declares no support. Give the class one, "
                "as support = constraints.real, by which its values and data are checked."
            )
        mark = site["infer"].get("enumerate")
        if mark:
            raise ValueError(
                f"site {name!r} of the {program} is marked for enumeration "
                f"(infer={{'enumerate': {mark!r}}}). These estimators "
                "sample discrete latents: remove the mark or config_enumerate."
            )


def _plates(site: Site) -> set[str]:
    return {f.name for f in site["cond_indep_stack"] if f.name != PARTICLES}


def _points(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Sites of Delta distributions."""
    for name, site in stochastic_sites(trace):
        if isinstance(_innermost(site["fn"]), dist.Delta):
            yield name, site


def has_points(*traces: Trace) -> bool:
    """Whether there is a site of a Delta distribution."""
    return any(True for trace in traces for _ in _points(trace))


def check_point_masses(run: Callable[[Any], dict[str, Trace]], params: Any) -> None:
    """Refuse Delta sites that parameters move: no score reaches these parameters.

    Args:
        run: from parameters to the traces of "model" and "guide". params: where.

    Raises:
        ValueError: naming the site and the program it stands in.
    """
    names: list[tuple[str, str]] = []

    def points(at: Any) -> list[Any]:
        found = {
            (program, name): _innermost(site["fn"]).v
            for program, trace in run(at).items()
            for name, site in _points(trace)
        }
        names[:] = found
        return list(found.values())

    values = record(points, parameters(params), params)
    for (program, name), value in zip(names, values, strict=True):
        if isinstance(value, Node):
            raise ValueError(
                f"site {name!r} of the {program} is a Delta whose value depends on parameters. "
                "Samples are constants here, so these parameters would never change. Use "
                "numpyro.deterministic for a function of parameters, or StochasticBackprop."
            )


def check_against_model(model: Trace, guide: Trace) -> None:
    """Refuse a guide whose sites, plates or supports are not those of the model's latents.

    Raises:
        ValueError: naming the site.
    """
    for name, site in stochastic_sites(guide):
        if site["is_observed"]:
            what = "a numpyro.factor" if is_factor(site["fn"]) else "observed"
            raise ValueError(
                f"site {name!r} of the guide is {what}: it would count neither in the weights nor "
                "in the directions. The guide may sample the model's latents alone."
            )
    in_model, in_guide = latents(model), latents(guide)
    for name in in_model:
        if name not in in_guide:
            raise ValueError(
                f"latent site {name!r} of the model is missing from the guide, which has "
                f"{sorted(in_guide)}. Every latent needs a sample site in the guide."
            )
    for name in in_guide:
        if name not in in_model:
            observed = name in model and model[name]["type"] == "sample"
            what = "is observed there" if observed else f"has {sorted(in_model)}"
            hint = ""
            if in_guide[name]["infer"].get("is_auxiliary"):
                hint = " Auxiliary sites, as automatic guides have them, are not supported."
            raise ValueError(
                f"site {name!r} of the guide is no latent of the model, which {what}.{hint}"
            )
    for name, site in in_guide.items():
        other = in_model[name]
        if _plates(site) != _plates(other):
            raise ValueError(
                f"latent site {name!r} stands in the plates {sorted(_plates(site))} of the guide "
                f"but in {sorted(_plates(other))} of the model. Both need the same plates."
            )
        _check_support(name, site, other)


def _check_support(name: str, guide: Site, model: Site) -> None:
    if guide["fn"].event_dim != model["fn"].event_dim:
        raise ValueError(
            f"latent site {name!r} has event_dim {guide['fn'].event_dim} in the guide but "
            f"{model['fn'].event_dim} in the model. Use the same to_event in both."
        )
    ours, theirs = guide["fn"].support, model["fn"].support
    if ours.is_discrete != theirs.is_discrete:
        raise ValueError(
            f"latent site {name!r} has support {ours} in the guide but {theirs} in the model."
        )


def check_observations(trace: Trace) -> None:
    """Refuse a program without observations, and an empty batch.

    Raises:
        ValueError: naming the site.
    """
    observed = {name: site for name, site in stochastic_sites(trace) if site["is_observed"]}
    if not observed:
        raise ValueError(
            "the model has no observed site. Condition it on data: "
            "numpyro.sample(name, distribution, obs=x)."
        )
    for name, site in observed.items():
        if np.size(site["value"]) == 0 and not is_factor(site["fn"]):
            raise ValueError(
                f"observed site {name!r} got an empty batch of shape {np.shape(site['value'])}."
            )


@partial(jax.tree_util.register_dataclass, data_fields=["count"], meta_fields=["message"])
@dataclass(frozen=True)
class Problem:
    """Something that may be wrong with values; a pytree.

    Attributes:
        count: how many values are. message: with ``{count}`` in it.
    """

    count: Array
    message: str


def problems(model: Trace, guide: Trace) -> list[Problem]:
    """NaN data, data outside their support, and latents that the model's support excludes."""
    found: list[Problem] = []
    for name, site in stochastic_sites(model):
        if site["is_observed"] and not is_factor(site["fn"]):
            found += _in_data(name, site)
    in_model = latents(model)
    for name, site in latents(guide).items():
        ours, theirs = _support(site), _support(in_model[name])
        if type(ours) is not type(theirs):
            message = (
                f"latent site {name!r}: the guide draws values with support {ours}, {{count}} of "
                f"which lie outside the model's support {theirs}."
            )
            found.append(Problem(jnp.sum(~theirs(site["value"])), message))
    return found


def bad_starts(params: dict[str, Any], unconstrained: dict[str, Any]) -> list[Problem]:
    """Parameters whose starting values no optimiser can move from.

    Args:
        params: constrained, by site name. unconstrained: the same values.
    """
    found = []
    for name in params:
        leaves = [x for x in jax.tree.leaves(unconstrained[name]) if _is_inexact(x)]
        count = sum((jnp.sum(~jnp.isfinite(x)) for x in leaves), jnp.zeros((), int))
        message = (
            f"parameter {name!r} starts at {{count}} values that are not finite or lie outside of "
            "its constraint, or on the constraint's edge."
        )
        found.append(Problem(count, message))
    return found


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _in_data(name: str, site: Site) -> Iterator[Problem]:
    value, fn = site["value"], site["fn"]
    missing = jnp.zeros((), int)
    if jnp.issubdtype(jnp.result_type(value), jnp.floating):
        missing = jnp.sum(jnp.isnan(value))
        message = (
            f"observed site {name!r} has {{count}} NaN values in its "
            "data. Put a finite placeholder there and mask the entries (handlers.mask)."
        )
        yield Problem(missing, message)
    support, kind = _support(site), type(_innermost(fn)).__name__
    outside = jnp.sum(~jnp.asarray(support(value)))
    message = (
        f"observed site {name!r}: {{count}} values lie outside the support {support} of {kind}."
    )
    yield Problem(jnp.where(missing > 0, 0, outside), message)


def raise_for(found: list[Problem]) -> None:
    """Raise the first problem that there is; where counts are tracers, none is seen.

    Raises:
        ValueError: naming the site.
    """
    for problem in found:
        if not isinstance(problem.count, jax.core.Tracer) and int(problem.count):
            raise ValueError(problem.message.replace("{count}", str(int(problem.count))))


@contextmanager
def blame_data(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Where programs break on empty data, say that instead of the host's error.

    Raises:
        ValueError: naming the argument.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
        for key, value in [*enumerate(args), *kwargs.items()]:
            if hasattr(value, "shape") and np.size(value) == 0:
                raise ValueError(
                    f"the data are an empty batch: argument {key!r} of the programs has shape "
                    f"{np.shape(value)}."
                ) from error
        raise


def check_declared(site: Site, shape: tuple[int, ...], ndim: float, what: str) -> None:
    """Refuse batch dimensions that no plate declares.

    Args:
        site: of a trace. shape: over its batch. ndim: how many dimensions there may be.
        what: the shape's name in the message.

    Raises:
        ValueError: naming the site, its shape and its plates.
    """
    declared = {f.dim: f.size for f in site["cond_indep_stack"]}
    for dim in range(-len(shape), 0):
        size = shape[dim]
        if (size != 1 and declared.get(dim) != size) or -dim > ndim:
            raise ValueError(
                f"site {site['name']!r} has {what} of shape {shape}, "
                f"but dimension {dim} (size {size}) belongs to no plate of it: it has "
                f"{ {f.name: (f.dim, f.size) for f in site['cond_indep_stack']} }. "
                "Declare the dimension by numpyro.plate or by .to_event(...)."
            )


def check_plates(site: Site) -> None:
    """The same for a site of a run without particles, whatever its values.

    Raises:
        ValueError: naming the site, its shape and its plates.
    """
    fn, value = site["fn"], np.shape(site["value"])
    check_declared(site, fn.batch_shape, math.inf, "a batch")
    check_declared(site, value[: max(0, len(value) - fn.event_dim)], math.inf, "a batch")


def check_program(name: str, program: Callable) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: naming which of the two it is.
    """
    if not callable(program):
        raise TypeError(f"the {name} must be a NumPyro program, got {program!r}.")


def mixes_particles(site: str) -> ValueError:
    """The error for a site that depends on latents of all particles together."""
    return ValueError(
        f"site {site!r} has one distribution for all particles, though it depends on latents. "
        "Particles stand in the leftmost batch dimension of every latent, and the program sums, "
        "indexes or averages over it. Take dimensions from the right: "
        "w.sum(-1, keepdims=True) and w[..., i] instead of w.sum() and w[i]."
    )


# Of programs and hosts, which name no site; kinds of their own pass as they are.
RAW = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)


def located(error: Exception, at: str, situation: str) -> Exception:
    """An error of a program, with where it happened; as it is where it names a site already.

    Args:
        error: from the program. at: the site it had come to. situation: how it ran.
    """
    if type(error) not in RAW or "site '" in str(error):
        return error
    first, *more = str(error).split("\n")  # hosts may add the shapes of all sites
    told = f"{first or type(error).__name__} ({at}; {situation})"
    return type(error)("\n".join([told, *more]))


@cache
def with_particles(count: int) -> str:
    """The situation of a program with particles."""
    return (
        f"the program ran with {count} particles, which stand in the leftmost batch dimension of "
        "its latents: where it fails for that, index and reduce from the right, as in w[..., i] "
        "and (x * w).sum(-1)"
    )


DREAMING = (
    "the model was to dream, which draws its observed sites, too: where that cannot be, train "
    "without the sleep phase (sleep_weight=0)"
)
