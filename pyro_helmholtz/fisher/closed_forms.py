"""Closed forms of the Fisher information; negative binomials' are in ``counts.py``."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .arguments import argument_names
from .registry import Information, register_fisher


def _logistic_variance(logits: Tensor) -> Tensor:
    """``σ(l) σ(-l)``."""
    p = logits.abs().neg_().sigmoid_()  # at most ½, so that 1 − p keeps its digits
    return p.addcmul_(p, p, value=-1)


def floored(x: Tensor) -> Tensor:
    """At least what is safe to divide by."""
    return x.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)


@register_fisher(torch.distributions.Bernoulli)
def _bernoulli(d: Any) -> Information:
    if d.__dict__.get("logits") is d._param:
        return {"logits": _logistic_variance(d.logits.detach())}
    probs = d.probs.detach()
    return {"probs": 1 / floored(probs * (1 - probs))}


@register_fisher(torch.distributions.Binomial)
def _binomial(d: Any) -> Information:
    count = d.total_count.detach()
    if "logits" in argument_names(d):
        return {"logits": count * _logistic_variance(d.logits.detach())}
    probs = d.probs.detach()
    return {"probs": count / floored(probs * (1 - probs))}


@register_fisher(torch.distributions.Normal)
def _normal(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    return {"loc": precision, "scale": 2 * precision}


@register_fisher(torch.distributions.Laplace)
def _laplace(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    return {"loc": precision, "scale": precision}


@register_fisher(torch.distributions.Poisson)
def _poisson(d: Any) -> Information:
    return {"rate": 1 / d.rate.detach()}


@register_fisher(torch.distributions.Exponential)
def _exponential(d: Any) -> Information:
    return {"rate": d.rate.detach() ** -2}


@register_fisher(torch.distributions.Geometric)
def _geometric(d: Any) -> Information:
    probs = d.probs.detach()
    if "logits" in argument_names(d):
        return {"logits": 1 - probs}
    return {"probs": 1 / floored(probs**2 * (1 - probs))}


@register_fisher(torch.distributions.Categorical)
@register_fisher(torch.distributions.OneHotCategorical)
def _categorical(d: Any) -> Information:
    probs = d.probs.detach()
    if "logits" in argument_names(d):
        return {"logits": torch.diag_embed(probs) - probs[..., None] * probs[..., None, :]}
    return {"probs": torch.diag_embed(1 / floored(probs))}


@register_fisher(torch.distributions.Multinomial)
def _multinomial(d: Any) -> Information:
    return {name: d.total_count * value for name, value in _categorical(d).items()}


@register_fisher(torch.distributions.VonMises)
def _von_mises(d: Any) -> Information:
    kappa = d.concentration.detach()
    a = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    ratio = torch.where(kappa > 1e-4, a / kappa.clamp(min=1e-4), 0.5 - kappa**2 / 16)
    # The difference loses its digits where the series in 1/κ has them.
    large = kappa > (4 / torch.finfo(kappa.dtype).eps) ** (1 / 6)
    inverse = 1 / torch.where(large, kappa, 1.0)
    series = inverse**2 * (0.5 + inverse * (0.25 + inverse * (0.375 + inverse * 0.78125)))
    spread = torch.where(large, series, (1 - a**2 - ratio).clamp(min=0))
    return {"loc": kappa * a, "concentration": spread}


@register_fisher(torch.distributions.Gamma)
def _gamma(d: Any) -> Information:
    a, b = d.concentration.detach(), d.rate.detach()
    return {
        ("concentration", "rate"): matrix_of([[torch.polygamma(1, a), -1 / b], [-1 / b, a / b**2]])
    }


@register_fisher(torch.distributions.Beta)
def _beta(d: Any) -> Information:
    a, b = d.concentration1.detach(), d.concentration0.detach()
    both = torch.polygamma(1, a + b)
    return {
        ("concentration1", "concentration0"): matrix_of(
            [[torch.polygamma(1, a) - both, -both], [-both, torch.polygamma(1, b) - both]]
        )
    }


@register_fisher(torch.distributions.MultivariateNormal)
@register_fisher(torch.distributions.LowRankMultivariateNormal)
def _multivariate_normal(d: Any) -> Information:
    return {"loc": d.precision_matrix.detach()}


@register_fisher(dist.MultivariateStudentT)
def _multivariate_student_t(d: Any) -> Information:
    """``(ν+p) / (ν+p+2) Σ⁻¹`` of p variables (Lange, Little and Taylor 1989, appendix B)."""
    count = d.df.detach() + d.event_shape[0]
    return {"loc": (count / (count + 2))[..., None, None] * d.precision_matrix.detach()}


def matrix_of(rows: list[list[Tensor]]) -> Tensor:
    """Coupled arguments' information (..., d, d) of its entries, which may broadcast."""
    return torch.stack([torch.stack(torch.broadcast_tensors(*row), -1) for row in rows], -2)
