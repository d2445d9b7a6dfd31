"""The Fisher information of negative binomials and of zero-inflated Poisson variables.

The count or dispersion of a negative binomial may be learned too.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .arguments import argument_names
from .closed_forms import floored, matrix_of
from .registry import Information, register_fisher

# Nodes u and weights of ``∫ u e^{-u} f(u) du`` over the positive reals (double exponential rule).
_AT = [i / 8 for i in range(-26, 32)]
_NODES = [math.exp(x - math.exp(-x)) for x in _AT]
_WEIGHTS = [u**2 * math.exp(-u) * (1 + math.exp(-x)) / 8 for u, x in zip(_NODES, _AT, strict=True)]


@register_fisher(torch.distributions.NegativeBinomial)
def _negative_binomial(d: Any) -> Information:
    count = d.total_count.detach()
    if "logits" in argument_names(d):
        name, logits = "logits", d.logits.detach()
        both = logits.sigmoid()
        alone = count * both
    else:
        name, probs = "probs", d.probs.detach()
        logits = probs.logit()
        both = 1 / floored(1 - probs)
        alone = count / floored(probs) * both**2
    if not d.total_count.requires_grad:
        return {name: alone}
    matrix = matrix_of([[_count_information(count, logits), both], [both, alone]])
    return {("total_count", name): matrix}


@register_fisher(dist.GammaPoisson)
def _gamma_poisson(d: Any) -> Information:
    a, b = d.concentration.detach(), d.rate.detach()
    both = -1 / (b * (1 + b))
    alone = -a * both / b
    if not d.concentration.requires_grad:
        return {"rate": alone}
    matrix = matrix_of([[_count_information(a, -b.log()), both], [both, alone]])
    return {("concentration", "rate"): matrix}


@register_fisher(dist.ZeroInflatedPoisson)
def _zero_inflated_poisson(d: Any) -> Information:
    """With ``p₀ = π + (1−π) e^{-λ}``: ``(1−e^{-λ}) / (p₀ (1−π))`` of the gate π, for one."""
    name, rate = argument_names(d)[0], d.rate.detach()
    gate = d.gate.detach()
    open_, none = 1 - gate, torch.exp(-rate)
    zero = floored(gate + open_ * none)
    slope = gate * open_ if name == "gate_logits" else torch.ones_like(gate)
    of_gate = -torch.expm1(-rate) / (zero * floored(open_)) * slope**2
    of_rate = open_ * (1 / rate - gate * none / zero)
    both = -none / zero * slope
    return {(name, "rate"): matrix_of([[of_gate, both], [both, of_rate]])}


def _count_information(count: Tensor, logits: Tensor) -> Tensor:
    """Of a negative binomial's count r, the logits fixed: ``ψ'(r) − E ψ'(r + x)``.

    It is ``∫ t e^{-rt} (1 − E e^{-tx}) / (1 − e^{-t}) dt``, here with ``u = rt``: a sum that is
    good to nine digits, where the series over x is long.
    """
    total = torch.zeros_like(logits * count)
    zero = torch.zeros_like(total)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        rest = -torch.expm1(-node / count)
        log_mean = -count * torch.logaddexp(logits + rest.log(), zero)
        total -= weight * torch.expm1(log_mean) / rest
    least = logits.sigmoid() / count  # so that rounding leaves no negative direction
    return torch.maximum(total / count**2, least)
