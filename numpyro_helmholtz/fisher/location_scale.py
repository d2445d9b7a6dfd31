"""The Fisher information of location-scale families and their kin, thick tails among them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import polygamma

from .closed_forms import matrix_of
from .registry import Array, Information, register_fisher

EULER = 0.5772156649015329
# Of ``log`` of a Weibull variable, or of a Gumbel one, at scale one: of the scale; of both.
OF_SCALE, OF_BOTH = math.pi**2 / 6 + (1 - EULER) ** 2, EULER - 1
LARGE_DF = 30.0  # from here on the series in 1/ν has the digits


@register_fisher(dist.HalfNormal)
def _half_normal(d: Any) -> Information:
    return {"scale": 2 * _square(d.scale)}


@register_fisher(dist.Cauchy)
def _cauchy(d: Any) -> Information:
    half = _square(d.scale) / 2
    return {"loc": half, "scale": half}


@register_fisher(dist.HalfCauchy)
def _half_cauchy(d: Any) -> Information:
    return {"scale": _square(d.scale) / 2}


@register_fisher(dist.Logistic)
def _logistic(d: Any) -> Information:
    precision = _square(d.scale)
    return {"loc": precision / 3, "scale": precision * (math.pi**2 + 3) / 9}


@register_fisher(dist.Gumbel)
def _gumbel(d: Any) -> Information:
    unit = jnp.array([[1.0, OF_BOTH], [OF_BOTH, OF_SCALE]])
    return {("loc", "scale"): _square(d.scale)[..., None, None] * unit}


@register_fisher(dist.Weibull)
def _weibull(d: Any) -> Information:
    k, both = d.concentration, OF_BOTH / jnp.asarray(d.scale)
    matrix = [[jnp.square(k / d.scale), both], [both, OF_SCALE * _square(k)]]
    return {("scale", "concentration"): matrix_of(matrix)}


@register_fisher(dist.StudentT)
def _student_t(d: Any) -> Information:
    """Lange, Little and Taylor (1989), appendix B."""
    df, precision = jnp.asarray(d.df), _square(d.scale)
    both = -2 / (d.scale * (df + 1) * (df + 3))
    of_scale = precision * 2 * df / (df + 3)
    matrix = [[_of_df(df), both], [both, of_scale]]
    return {"loc": precision * (df + 1) / (df + 3), ("df", "scale"): matrix_of(matrix)}


def _of_df(df: Array) -> Array:
    """``¼ (ψ'(ν/2) − ψ'((ν+1)/2)) − (ν+5) / (2ν (ν+1) (ν+3))``.

    For many degrees of freedom the terms cancel; their difference has a series in 1/ν.
    """
    few, many = jnp.minimum(df, LARGE_DF), jnp.maximum(df, LARGE_DF)
    exact = (polygamma(1, few / 2) - polygamma(1, (few + 1) / 2)) / 4
    exact = exact - (few + 5) / (2 * few * (few + 1) * (few + 3))
    square = many**-2.0
    tail = square * (0.5 - square * (1.5 - square * (8.5 - square * 77.5)))
    series = ((7 * many + 3) / (2 * (many + 1) * (many + 3)) - tail) / many**3
    return jnp.where(df < LARGE_DF, exact, series)


def _square(scale: Any) -> Array:
    """``scale⁻²``."""
    return jnp.asarray(scale, jnp.result_type(scale, float)) ** -2.0
