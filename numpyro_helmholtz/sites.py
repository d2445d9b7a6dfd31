"""What a trace's sites hold: log-densities, sampled values, mutable state."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.distributions import constraints

from .checks import Site, Trace
from .parameters import Params


def site_log_prob(site: Site) -> Array:
    """Log-density of a site: unscaled, masked entries zero, shape = batch shape."""
    if "helmholtz_log_prob" not in site:
        try:
            site["helmholtz_log_prob"] = _off_the_kink(site["fn"]).log_prob(site["value"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"site {site['name']!r}: {error}") from error
    return site["helmholtz_log_prob"]


def _off_the_kink(fn: Any) -> Any:
    """The distribution, with logits of exactly 0 moved by the smallest normal number.

    NumPyro's Bernoulli and binomial take ``max(l, 0)`` and ``log1p(exp(-|l|))``, whose slopes at
    l = 0, as autodiff has them, add up to 0 or 1 where those of the density are ±1/2.
    """
    if isinstance(fn, dist.BernoulliLogits | dist.BinomialLogits):
        tiny = jnp.finfo(jnp.result_type(fn.logits, jnp.float32)).tiny
        return _with(fn, "logits", fn.logits + jnp.where(fn.logits == 0, tiny, 0))
    if hasattr(fn, "base_dist"):
        return _with(fn, "base_dist", _off_the_kink(fn.base_dist))
    return fn


def _with(fn: Any, name: str, value: Any) -> Any:
    fn = copy.copy(fn)
    setattr(fn, name, value)
    return fn


def in_data_type(site: Site, observed: Any) -> Array:
    """A dream in the type of its data: NumPyro draws bits as integers, data are often floats.

    A dream that can be a fraction stays one: data of integers may have a continuous distribution.
    So does a dream of whole numbers, but of bits, where the data's type has less room: it may be
    larger than they.
    """
    value, dtype = site["value"], jnp.result_type(observed)
    if not jnp.issubdtype(dtype, jnp.inexact):
        support = site["fn"].support
        if not support.is_discrete:
            return value
        narrow = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < value.dtype.itemsize
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if narrow and support is not constraints.boolean:
            return value
    return value.astype(dtype)


def sampled_values(trace: Trace) -> dict[str, Array]:
    """Values of all sampled sites and of the subsampled plates' indices, by name."""
    return {
        name: site["value"]
        for name, site in trace.items()
        if (site["type"] == "sample" and not site["is_observed"]) or _is_subsampled(site)
    }


def subsample_values(trace: Trace) -> dict[str, Array]:
    """The indices of the subsampled plates, by name."""
    return {name: site["value"] for name, site in trace.items() if _is_subsampled(site)}


def _is_subsampled(site: Site) -> bool:
    return site["type"] == "plate" and site["args"][1] not in (None, site["args"][0])


def mutable_values(*traces: Trace) -> Params:
    """Mutable state after the programs have run, by name; later traces win."""
    return {
        name: lax.stop_gradient(site["value"])
        for trace in traces
        for name, site in trace.items()
        if site["type"] == "mutable"
    }
