"""What is refused, and how it is said: every error names the site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

Site = Any
PARTICLES = "num_particles_vectorized"


def is_stochastic(site: Site) -> bool:
    """True for sample sites that carry probability."""
    return (
        site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not is_deterministic(site)
    )


def is_deterministic(site: Site) -> bool:
    """Whether a site is a function of its parents, not a sample, as ``poutine.reparam`` has too."""
    if site["infer"].get("_deterministic"):
        return True
    return (
        isinstance(site["fn"], dist.MaskedDistribution)
        and site["fn"]._mask is False
        and bool(site["is_observed"])
        and isinstance(_innermost(site["fn"]), dist.Delta)
    )


def latents(trace: poutine.Trace) -> dict[str, Site]:
    """The sites that were sampled, not observed."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if is_stochastic(site) and not site["is_observed"]
    }


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _declares_support(fn: Any) -> bool:
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def check_sites(trace: poutine.Trace, program: str) -> None:
    """Refuse enumeration marks, and distributions that do not say where their values lie.

    Raises:
        ValueError: naming the site and the program it stands in.
    """
    nodes: dict[str, Site] = dict(trace.nodes)
    for name, site in nodes.items():
        if not is_stochastic(site):
            continue
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


def check_point_masses(trace: poutine.Trace, program: str) -> None:
    """Refuse Delta sites that parameters move: no score reaches these parameters.

    Raises:
        ValueError: naming the site and the program it stands in.
    """
    nodes: dict[str, Site] = dict(trace.nodes)
    for name, site in nodes.items():
        if not is_stochastic(site):
            continue
        fn = _innermost(site["fn"])
        if isinstance(fn, dist.Delta) and fn.v.requires_grad:
            raise ValueError(
                f"site {name!r} of the {program} is a Delta whose value depends on parameters. "
                "Samples are constants here, so these parameters would never change. Use "
                "pyro.deterministic for a function of parameters, or StochasticBackprop."
            )


def check_against_model(model: poutine.Trace, guide: poutine.Trace) -> None:
    """Refuse a guide whose sites, plates or supports are not those of the model's latents.

    Raises:
        ValueError: naming the site.
    """
    for name, site in dict(guide.nodes).items():
        if is_stochastic(site) and site["is_observed"]:
            what = "a pyro.factor" if isinstance(site["fn"], dist.Unit) else "observed"
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
            observed = name in model.nodes and model.nodes[name]["type"] == "sample"
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
    if type(ours) is type(theirs) or str(ours) == str(theirs):
        return
    if not bool(theirs.check(guide["value"]).all()):
        raise ValueError(
            f"latent site {name!r}: the guide draws values with support {ours}, some of which lie "
            f"outside the model's support {theirs}."
        )


def check_observations(trace: poutine.Trace) -> None:
    """Refuse a program without observations, an empty batch and NaN data.

    Raises:
        ValueError: naming the site.
    """
    any_observed = False
    nodes: dict[str, Site] = dict(trace.nodes)
    for name, site in nodes.items():
        if not (is_stochastic(site) and site["is_observed"]):
            continue
        any_observed = True
        value = site["value"]
        if not torch.is_tensor(value) or _is_plainly_binary(site["fn"], value):
            continue
        if value.numel() == 0 and type(site["fn"]).__name__ != "Unit":
            raise ValueError(
                f"observed site {name!r} got an empty batch of shape {tuple(value.shape)}."
            )
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ValueError(
                f"observed site {name!r} has {int(torch.isnan(value).sum())} NaN values in its "
                "data. Put a finite placeholder there and mask the entries (poutine.mask)."
            )
        if type(site["fn"]).__name__ == "Unit":
            continue
        valid = site["fn"].support.check(value)
        if not bool(valid.all()):
            raise ValueError(
                f"observed site {name!r}: {int((~valid).sum())} of {valid.numel()} values lie "
                f"outside the support {site['fn'].support} of {type(site['fn']).__name__}."
            )
    if not any_observed:
        raise ValueError(
            "the model has no observed site. Condition it on data: "
            "pyro.sample(name, distribution, obs=x)."
        )


def _is_plainly_binary(fn: Any, value: torch.Tensor) -> bool:
    """Whether data are zeros and ones as a binary site needs, in fewer passes than ``support``."""
    support = fn.support if value.numel() else None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.boolean or value.dtype is torch.bool:
        return False
    return torch.equal((value != 0).to(value.dtype), value)


@contextmanager
def blame_data(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Where programs break on empty or NaN data or lack a plate, say that, not the host's error.

    Raises:
        ValueError: naming the argument or the site.
    """
    try:
        yield
    except (ValueError, RuntimeError, ArithmeticError) as error:
        for key, value in [*enumerate(args), *kwargs.items()]:
            if torch.is_tensor(value) and value.numel() == 0:
                raise ValueError(
                    f"the data are an empty batch: argument {key!r} of the programs has shape "
                    f"{tuple(value.shape)}."
                ) from error
        try:
            with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        except Exception:
            raise error from None
        check_observations(trace)
        if PARTICLES in str(error):
            nodes: dict[str, Site] = dict(trace.nodes)
            for site in filter(is_stochastic, nodes.values()):
                check_plates(site)
        raise


def check_log_prob_shape(site: Site, log_prob: torch.Tensor, ndim: int) -> None:
    """Refuse batch dimensions that no plate declares.

    Raises:
        ValueError: naming the site, its shape and its plates.
    """
    _check_declared(site, tuple(log_prob.shape), ndim, "log-probabilities")


def check_plates(site: Site) -> None:
    """The same for a site of a run without particles, whatever its values.

    Raises:
        ValueError: naming the site, its shape and its plates.
    """
    fn, mask = site["fn"], site["mask"]
    value = tuple(getattr(site["value"], "shape", ()))
    shapes = [tuple(fn.batch_shape), value[: max(0, len(value) - fn.event_dim)]]
    if torch.is_tensor(mask):
        shapes.append(tuple(mask.shape))
    for shape in shapes:
        _check_declared(site, shape, math.inf, "a batch")


def _check_declared(site: Site, shape: tuple[int, ...], ndim: float, what: str) -> None:
    declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-len(shape), 0):
        size = shape[dim]
        if (size != 1 and declared.get(dim) != size) or -dim > ndim:
            raise ValueError(
                f"site {site['name']!r} has {what} of shape {shape}, "
                f"but dimension {dim} (size {size}) belongs to no plate of it: it has "
                f"{ {f.name: (f.dim, f.size) for f in site['cond_indep_stack']} }. "
                "Declare the dimension by pyro.plate or by .to_event(...)."
            )


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
