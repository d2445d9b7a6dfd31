"""Price's theorem: the gradient in a Gaussian's covariance from second derivatives.

A Gaussian site draws ``z = μ + R ε`` with covariance ``C = R Rᵀ``. Bonnet's and Price's theorems
(Rezende, Mohamed and Wierstra 2014, equations 7 and 8) are ``∇_μ E f = E ∇f`` and
``∇_C E f = ½ E ∇²f``, so that ``½ ∇²f : ∂(R Rᵀ) = E_v[(∇²f R v) · ∂R v]`` for any v with
``E v vᵀ = I``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random

from ..checks import Trace
from ..distributions import RankOnePrecisionNormal
from ..fisher.families import unwrap
from ..layout import Layout

GAUSSIAN = (dist.Normal, dist.MultivariateNormal, RankOnePrecisionNormal)
KINKS = {"relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid", "hard_silu"}


def gaussian(fn: Any) -> Any | None:
    """The innermost distribution of a Gaussian site, or None where Price's theorem is silent."""
    return of_family(GAUSSIAN, fn)


def of_family(families: tuple[type, ...], fn: Any) -> Any | None:
    """The innermost distribution, if it is one of some families and nothing transforms it."""
    base = unwrap(fn)
    return base.fn if type(base.fn) in families and not base.transforms else None


def root(fn: Any, v: Array) -> Array:
    """``R v`` for a Gaussian, v of its samples' shape; differentiable in its arguments."""
    if isinstance(fn, dist.Normal):
        return fn.scale * v
    if isinstance(fn, dist.MultivariateNormal):
        return jnp.matmul(fn.scale_tril, v[..., None])[..., 0]
    return fn.root(v)


def price_terms(
    elbo: Callable,
    at: dict[str, Array],
    guide: Trace,
    layout: Layout,
    rng_key: Array,
    hessian: str,
    num_probes: int,
) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """The gradient of a function of samples, and products with its Hessian at Gaussian sites.

    Args:
        elbo: of what is added to each latent's sample, by site. at: zeros in their shapes.
        guide: the trace that the samples come from. layout: of the model.
        rng_key: of the probes.
        hessian: "probes" or "exact". num_probes: how many random ones.

    Returns:
        Gradients by site; by Gaussian site the probes v and the products ``∇²f R v``, each
        (number of probes, *shape of the sample), the products divided by that number if the
        probes are random.
    """
    slope = jax.grad(elbo)
    fns = {name: gaussian(guide[name]["fn"]) for name in at}
    known = {name: fn for name, fn in fns.items() if fn is not None}
    if not known:
        return slope(at), {}
    warn_of_kinks(elbo, at)
    exact = hessian == "exact"
    values = {name: at[name] for name in known}
    if exact:
        probes = _units(
            rng_key, values, {n: len(guide[n]["fn"].event_shape) for n in known}, layout
        )
    else:
        probes = _signs(rng_key, values, num_probes)
    spread = {name: root(fn, probes[name]) for name, fn in known.items()}
    count = len(next(iter(probes.values())))
    still = {n: jnp.zeros((count, *x.shape), x.dtype) for n, x in at.items() if n not in known}
    if count == 1:  # one product needs no batch
        tangent = {name: x[0] for name, x in {**spread, **still}.items()}
        slopes, products = jax.jvp(slope, (at,), (tangent,))
        products = {name: x[None] for name, x in products.items()}
    else:
        slopes, product = jax.linearize(slope, at)
        products = jax.vmap(product)({**spread, **still})
    share = 1.0 if exact else 1.0 / num_probes
    return slopes, {name: (probes[name], products[name] * share) for name in known}


def _signs(rng_key: Array, values: dict[str, Array], count: int) -> dict[str, Array]:
    """Independent signs at all sites, (count, *shape); cross terms have mean zero."""
    keys = random.split(rng_key, len(values))
    return {
        name: random.rademacher(key, (count, *value.shape), value.dtype)
        for key, (name, value) in zip(keys, values.items(), strict=True)
    }


def _units(
    rng_key: Array, values: dict[str, Array], events: dict[str, int], layout: Layout
) -> dict[str, Array]:
    """Each basis vector of each site, at all particles and data at once, with random signs.

    That is exact where particles, and data along the plates that all sites share, are
    independent, for then the Hessian has no entries between them and a sign meets itself. Should
    something couple them after all, such as batch normalisation, the signs keep it unbiased.

    Args:
        rng_key: of the signs. values: in the shapes of the samples, by site.
        events: number of event dimensions by site. layout: of the model.

    Returns:
        By site (number of vectors at all sites, *shape).
    """
    keys = random.split(rng_key, len(values))
    blocks = {}
    for key, (name, value) in zip(keys, values.items(), strict=True):
        batch = value.ndim - events[name]
        together = {batch - layout.ndim} | {batch + dim for dim in layout.shared}
        sizes = [(n, 1) if d in together else (1, n) for d, n in enumerate(value.shape)]
        signs = random.rademacher(key, tuple(n for n, _ in sizes), value.dtype)
        units = math.prod(n for _, n in sizes)
        basis = jnp.eye(units, dtype=value.dtype).reshape(units, *(n for _, n in sizes))
        blocks[name] = basis * signs
    total, start, found = sum(map(len, blocks.values())), 0, {}
    for name, block in blocks.items():
        zeros = jnp.zeros((total, *block.shape[1:]), block.dtype)
        found[name] = zeros.at[start : start + len(block)].set(block)
        start += len(block)
    return found


def warn_of_kinks(fn: Callable[..., Any], *args: Any) -> None:
    """Warn of functions whose second derivative is not the one that Price's theorem means.

    The second derivative of a rectifier is a point mass at its kink, which automatic
    differentiation takes for 0.
    """
    found = sorted(_names(jax.make_jaxpr(fn)(*args).jaxpr) & KINKS)
    if found:
        warnings.warn(
            f"estimator='price' needs twice differentiable programs, but these use {found[0]}, "
            "whose second derivative at its kink is lost: the gradient of scales is biased. Use a "
            "smooth function (softplus, tanh, ...) or estimator='path'.",
            UserWarning,
            stacklevel=2,
        )


def _names(jaxpr: Any) -> set[str]:
    """Names of all functions that a jaxpr calls."""
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        if isinstance(eqn.params.get("name"), str):
            found.add(eqn.params["name"])
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _names(inner)
    return found
