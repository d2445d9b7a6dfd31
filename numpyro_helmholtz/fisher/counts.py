"""The Fisher information of negative binomials and of zero-inflated Poisson variables.

The count or dispersion of a negative binomial may be learned too.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from .closed_forms import matrix_of, tiny
from .registry import Information, register_fisher

# Nodes u and weights of ``∫ u e^{-u} f(u) du`` over the positive reals (double exponential rule).
_AT = [i / 8 for i in range(-26, 32)]
_NODES = [math.exp(x - math.exp(-x)) for x in _AT]
_WEIGHTS = [u**2 * math.exp(-u) * (1 + math.exp(-x)) / 8 for u, x in zip(_NODES, _AT, strict=True)]


@register_fisher(dist.NegativeBinomialLogits)
def _negative_binomial_logits(d: Any) -> Information:
    both = jax.nn.sigmoid(d.logits)
    alone = d.total_count * both
    if _is_plain(d.total_count):
        return {"logits": alone}
    matrix = matrix_of([[_count_information(d.total_count, d.logits), both], [both, alone]])
    return {("total_count", "logits"): matrix}


@register_fisher(dist.NegativeBinomialProbs)
def _negative_binomial_probs(d: Any) -> Information:
    least = tiny(d.probs)
    both = 1 / jnp.maximum(1 - d.probs, least)
    alone = d.total_count / jnp.maximum(d.probs, least) * both**2
    if _is_plain(d.total_count):
        return {"probs": alone}
    logits = jax.scipy.special.logit(d.probs)
    matrix = matrix_of([[_count_information(d.total_count, logits), both], [both, alone]])
    return {("total_count", "probs"): matrix}


@register_fisher(dist.NegativeBinomial2)
def _negative_binomial_mean(d: Any) -> Information:
    alone = 1 / jnp.maximum(d.variance, tiny(d.variance))
    if _is_plain(d.concentration):
        return {"mean": alone}
    count = _count_information(d.concentration, -jnp.log(d.rate))
    return {"mean": alone, "concentration": count - 1 / (d.concentration * (1 + d.rate))}


@register_fisher(dist.GammaPoisson)
def _gamma_poisson(d: Any) -> Information:
    a, b = d.concentration, d.rate
    both = -1 / (b * (1 + b))
    alone = -a * both / b
    if _is_plain(a):
        return {"rate": alone}
    matrix = matrix_of([[_count_information(a, -jnp.log(b)), both], [both, alone]])
    return {("concentration", "rate"): matrix}


@register_fisher(dist.ZeroInflatedPoisson)
def _zero_inflated_poisson(d: Any) -> Information:
    """With ``p₀ = π + (1−π) e^{-λ}``: ``(1−e^{-λ}) / (p₀ (1−π))`` of the gate π, for one."""
    gate, rate = jnp.asarray(d.gate), jnp.asarray(d.rate)
    open_, none = 1 - gate, jnp.exp(-rate)
    zero = jnp.maximum(gate + open_ * none, tiny(gate))
    of_gate = -jnp.expm1(-rate) / (zero * jnp.maximum(open_, tiny(gate)))
    of_rate = open_ * (1 / rate - gate * none / zero)
    both = -none / zero
    return {("gate", "rate"): matrix_of([[of_gate, both], [both, of_rate]])}


def _is_plain(x: Any) -> bool:
    """Whether it is a number of Python or NumPy, which no parameter is."""
    return not isinstance(x, jax.Array)


def _count_information(count: Array, logits: Array) -> Array:
    """Of a negative binomial's count r, the logits fixed: ``ψ'(r) − E ψ'(r + x)``.

    It is ``∫ t e^{-rt} (1 − E e^{-tx}) / (1 − e^{-t}) dt``, here with ``u = rt``: a sum that is
    good to nine digits, where the series over x is long.
    """
    logits = jnp.asarray(logits)
    nodes, weights = (jnp.asarray(x, logits.dtype) for x in (_NODES, _WEIGHTS))
    wide = jnp.asarray(count, logits.dtype)[..., None]
    rest = -jnp.expm1(-nodes / wide)
    log_mean = -wide * jax.nn.softplus(logits[..., None] + jnp.log(rest))
    total = -(weights * jnp.expm1(log_mean) / rest).sum(-1)
    least = jax.nn.sigmoid(logits) / count  # so that rounding leaves no negative direction
    return jnp.maximum(total / count**2, least)
