"""Closed forms of the Fisher information; negative binomials' are in ``counts.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import i0e, i1e, polygamma

from .registry import Array, Information, register_fisher


def _logistic_variance(logits: Array) -> Array:
    """``σ(l) σ(-l)``, by one exponential that cannot overflow."""
    e = jnp.exp(-jnp.abs(logits))
    return e / jnp.square(1 + e)


def tiny(x: Any) -> float:
    """A floor that is safe to divide by."""
    return float(jnp.finfo(jnp.result_type(x, float)).tiny) ** 0.5


@register_fisher(dist.BernoulliLogits)
def _bernoulli_logits(d: Any) -> Information:
    return {"logits": _logistic_variance(d.logits)}


@register_fisher(dist.BernoulliProbs)
def _bernoulli_probs(d: Any) -> Information:
    return {"probs": 1 / jnp.maximum(d.probs * (1 - d.probs), tiny(d.probs))}


@register_fisher(dist.BinomialLogits)
def _binomial_logits(d: Any) -> Information:
    return {"logits": d.total_count * _logistic_variance(d.logits)}


@register_fisher(dist.BinomialProbs)
def _binomial_probs(d: Any) -> Information:
    return {"probs": d.total_count / jnp.maximum(d.probs * (1 - d.probs), tiny(d.probs))}


@register_fisher(dist.Normal)
def _normal(d: Any) -> Information:
    precision = d.scale**-2.0
    return {"loc": precision, "scale": 2 * precision}


@register_fisher(dist.Laplace)
def _laplace(d: Any) -> Information:
    precision = d.scale**-2.0
    return {"loc": precision, "scale": precision}


@register_fisher(dist.Poisson)
def _poisson(d: Any) -> Information:
    return {"rate": 1 / d.rate}


@register_fisher(dist.Exponential)
def _exponential(d: Any) -> Information:
    return {"rate": d.rate**-2.0}


@register_fisher(dist.GeometricLogits)
def _geometric_logits(d: Any) -> Information:
    return {"logits": jax.nn.sigmoid(-d.logits)}


@register_fisher(dist.GeometricProbs)
def _geometric_probs(d: Any) -> Information:
    return {"probs": 1 / jnp.maximum(d.probs**2 * (1 - d.probs), tiny(d.probs))}


def _simplex_logits(logits: Array) -> Array:
    probs = jax.nn.softmax(logits, -1)
    return _diagonal(probs) - probs[..., None] * probs[..., None, :]


def _simplex_probs(probs: Array) -> Array:
    return _diagonal(1 / jnp.maximum(probs, tiny(probs)))


@register_fisher(dist.CategoricalLogits)
def _categorical_logits(d: Any) -> Information:
    return {"logits": _simplex_logits(d.logits)}


@register_fisher(dist.CategoricalProbs)
def _categorical_probs(d: Any) -> Information:
    return {"probs": _simplex_probs(d.probs)}


@register_fisher(dist.MultinomialLogits)
def _multinomial_logits(d: Any) -> Information:
    count = jnp.asarray(d.total_count)[..., None, None]
    return {"logits": count * _simplex_logits(d.logits)}


@register_fisher(dist.MultinomialProbs)
def _multinomial_probs(d: Any) -> Information:
    count = jnp.asarray(d.total_count)[..., None, None]
    return {"probs": count * _simplex_probs(d.probs)}


@register_fisher(dist.VonMises)
def _von_mises(d: Any) -> Information:
    kappa = jnp.asarray(d.concentration, jnp.result_type(d.concentration, float))
    a = i1e(kappa) / i0e(kappa)
    small, large = kappa <= 1e-4, kappa > (4 / jnp.finfo(kappa.dtype).eps) ** (1 / 6)
    ratio = jnp.where(small, 0.5 - kappa**2 / 16, a / jnp.where(small, 1.0, kappa))
    # The difference loses its digits where the series in 1/κ has them.
    inverse = 1 / jnp.where(large, kappa, 1.0)
    series = inverse**2 * (0.5 + inverse * (0.25 + inverse * (0.375 + inverse * 0.78125)))
    spread = jnp.where(large, series, jnp.maximum(1 - a**2 - ratio, 0))
    return {"loc": kappa * a, "concentration": spread}


@register_fisher(dist.Gamma)
def _gamma(d: Any) -> Information:
    a, b = d.concentration, d.rate
    return {("concentration", "rate"): matrix_of([[polygamma(1, a), -1 / b], [-1 / b, a / b**2]])}


@register_fisher(dist.Beta)
def _beta(d: Any) -> Information:
    a, b = d.concentration1, d.concentration0
    both = polygamma(1, a + b)
    return {
        ("concentration1", "concentration0"): matrix_of(
            [[polygamma(1, a) - both, -both], [-both, polygamma(1, b) - both]]
        )
    }


@register_fisher(dist.MultivariateNormal)
def _multivariate_normal(d: Any) -> Information:
    return {"loc": d.precision_matrix}


@register_fisher(dist.LowRankMultivariateNormal)
def _low_rank_multivariate_normal(d: Any) -> Information:
    """By the matrix inversion lemma; the host's own ``precision_matrix`` fails."""
    over = jnp.swapaxes(d.cov_factor, -1, -2) / d.cov_diag[..., None, :]
    root = solve_triangular(d._capacitance_tril, over, lower=True)
    return {"loc": _diagonal(1 / d.cov_diag) - jnp.swapaxes(root, -1, -2) @ root}


@register_fisher(dist.MultivariateStudentT)
def _multivariate_student_t(d: Any) -> Information:
    """``(ν+p) / (ν+p+2) Σ⁻¹`` of p variables (Lange, Little and Taylor 1989, appendix B)."""
    count = jnp.asarray(d.df + d.event_shape[0])
    return {"loc": (count / (count + 2))[..., None, None] * d.precision_matrix}


def _diagonal(x: Array) -> Array:
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def matrix_of(rows: list[list[Array]]) -> Array:
    """Coupled arguments' information (..., d, d) of its entries, which may broadcast."""
    return jnp.stack([jnp.stack(jnp.broadcast_arrays(*row), -1) for row in rows], -2)
