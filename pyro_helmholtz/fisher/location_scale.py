"""The Fisher information of location-scale families and their kin, thick tails among them."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .closed_forms import matrix_of
from .registry import Information, register_fisher

EULER = 0.5772156649015329
# Of ``log`` of a Weibull variable, or of a Gumbel one, at scale one: of the scale; of both.
OF_SCALE, OF_BOTH = math.pi**2 / 6 + (1 - EULER) ** 2, EULER - 1
LARGE_DF = 30.0  # from here on the series in 1/ν has the digits


@register_fisher(torch.distributions.HalfNormal)
def _half_normal(d: Any) -> Information:
    return {"scale": 2 * d.scale.detach() ** -2}


@register_fisher(torch.distributions.Cauchy)
def _cauchy(d: Any) -> Information:
    half = d.scale.detach() ** -2 / 2
    return {"loc": half, "scale": half}


@register_fisher(torch.distributions.HalfCauchy)
def _half_cauchy(d: Any) -> Information:
    return {"scale": d.scale.detach() ** -2 / 2}


@register_fisher(dist.Logistic)
def _logistic(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    return {"loc": precision / 3, "scale": precision * (math.pi**2 + 3) / 9}


@register_fisher(torch.distributions.Gumbel)
def _gumbel(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    unit = precision.new_tensor([[1.0, OF_BOTH], [OF_BOTH, OF_SCALE]])
    return {("loc", "scale"): precision[..., None, None] * unit}


@register_fisher(torch.distributions.Weibull)
def _weibull(d: Any) -> Information:
    k, scale = d.concentration.detach(), d.scale.detach()
    matrix = [[(k / scale) ** 2, OF_BOTH / scale], [OF_BOTH / scale, OF_SCALE * k**-2]]
    return {("scale", "concentration"): matrix_of(matrix)}


@register_fisher(torch.distributions.StudentT)
def _student_t(d: Any) -> Information:
    """Lange, Little and Taylor (1989), appendix B."""
    df, scale = d.df.detach(), d.scale.detach()
    both = -2 / (scale * (df + 1) * (df + 3))
    of_scale = 2 * df / (df + 3) / scale**2
    matrix = [[_of_df(df), both], [both, of_scale]]
    return {"loc": (df + 1) / (df + 3) / scale**2, ("df", "scale"): matrix_of(matrix)}


def _of_df(df: Tensor) -> Tensor:
    """``¼ (ψ'(ν/2) − ψ'((ν+1)/2)) − (ν+5) / (2ν (ν+1) (ν+3))``.

    For many degrees of freedom the terms cancel; their difference has a series in 1/ν.
    """
    few, many = df.clamp(max=LARGE_DF), df.clamp(min=LARGE_DF)
    exact = (torch.polygamma(1, few / 2) - torch.polygamma(1, (few + 1) / 2)) / 4
    exact = exact - (few + 5) / (2 * few * (few + 1) * (few + 3))
    square = many**-2
    tail = square * (0.5 - square * (1.5 - square * (8.5 - square * 77.5)))
    series = ((7 * many + 3) / (2 * (many + 1) * (many + 3)) - tail) / many**3
    return torch.where(df < LARGE_DF, exact, series)
