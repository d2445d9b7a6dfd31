"""Observed distributions as exponential families: ``log p(x) = η·s(x) − log Z + log h(x)``.

Amortised learning regresses η and log Z on the observations and not ``log p`` itself, which
halves the error (Wenliang et al. 2020, section 3.3). The form is found from the observed
site's distribution. A distribution that is not in the registry is no error: its log-density is
regressed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import transforms as tt
from torch.nn.functional import logsigmoid, one_hot, softplus

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass
class ExponentialFamily:
    """One distribution, or a batch of them, in its natural form.

    ``batch`` is the batch shape with the dimensions that ``Independent`` reinterprets.

    Attributes:
        natural: η, one tensor (*batch, *statistic) for each statistic. Leading dimensions of
            size 1 stand for equal values and may be missing.
        statistics: s, from a value to as many tensors (*batch, *statistic).
        log_normaliser: log Z, (*batch,).
        log_base: log h, from a value to (*batch,). It must not depend on any parameter.
        fixed: arguments that the base measure or the statistics use. The form holds only where
            they have no gradient and do not differ between the dreams.
    """

    natural: tuple[Tensor, ...]
    statistics: Callable[[Tensor], tuple[Tensor, ...]]
    log_normaliser: Tensor
    log_base: Callable[[Tensor], Tensor]
    fixed: tuple[Tensor, ...] = ()


Rule = Callable[[Any], ExponentialFamily | None]
R = TypeVar("R", bound=Rule)
_RULES: dict[type, Rule] = {}


def register_exponential_family(distribution: type) -> Callable[[R], R]:
    """Register the natural form of a distribution.

    Args:
        distribution: the class; subclasses inherit the rule.

    Returns:
        A decorator for a function ``rule(d) -> ExponentialFamily``, or None where ``d`` has
        no such form after all.

    Raises:
        TypeError: ``distribution`` is not a class.
    """
    if not isinstance(distribution, type):
        raise TypeError(
            f"register_exponential_family needs a distribution class, got {distribution!r}."
        )

    def decorate(rule: R) -> R:
        _RULES[distribution] = rule
        return rule

    return decorate


def exponential_family(fn: Any) -> ExponentialFamily | None:
    """The natural form of a site's distribution, or None if it is not known to have one.

    Independent, expanded and masked distributions are unwrapped; so are transformed ones with
    fixed bijections (``T = exp, sigmoid, tanh, softplus``, affine with numbers).
    """
    if isinstance(fn, td.Independent | dist.torch_distribution.MaskedDistribution):
        return exponential_family(fn.base_dist)
    if isinstance(fn, dist.torch_distribution.ExpandedDistribution):
        return _expanded(exponential_family(fn.base_dist), fn)
    for cls in type(fn).__mro__:
        if cls in _RULES:
            return _RULES[cls](fn)
    return None


def _expanded(form: ExponentialFamily | None, fn: Any) -> ExponentialFamily | None:
    if form is None:
        return None
    shape, inner = fn.batch_shape, len(fn.base_dist.batch_shape)

    def expand(value: Tensor) -> Tensor:
        return value.expand(shape + value.shape[inner:])

    natural = tuple(expand(eta) for eta in form.natural)
    return replace(form, natural=natural, log_normaliser=expand(form.log_normaliser))


def _zero_base(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _flat_base(value: Tensor) -> Tensor:
    return torch.zeros_like(value[..., 0])


def _gaussian(loc: Tensor, scale: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    precision = scale**-2
    return (loc * precision, -0.5 * precision), 0.5 * loc.square() * precision + scale.log()


@register_exponential_family(td.Normal)
def _normal(d: Any) -> ExponentialFamily:
    natural, log_z = _gaussian(d.loc, d.scale)
    return ExponentialFamily(
        natural, lambda x: (x, x.square()), log_z, lambda x: torch.full_like(x, -HALF_LOG_2PI)
    )


@register_exponential_family(td.LogNormal)
def _log_normal(d: Any) -> ExponentialFamily:
    natural, log_z = _gaussian(d.loc, d.scale)
    return ExponentialFamily(
        natural, lambda x: (x.log(), x.log().square()), log_z, lambda x: -x.log() - HALF_LOG_2PI
    )


@register_exponential_family(td.HalfNormal)
def _half_normal(d: Any) -> ExponentialFamily:
    base = math.log(2) - HALF_LOG_2PI
    return ExponentialFamily(
        (-0.5 * d.scale**-2,),
        lambda x: (x.square(),),
        d.scale.log(),
        lambda x: torch.full_like(x, base),
    )


@register_exponential_family(td.Bernoulli)
def _bernoulli(d: Any) -> ExponentialFamily:
    return ExponentialFamily((d.logits,), lambda x: (x,), softplus(d.logits), _zero_base)


@register_exponential_family(td.ContinuousBernoulli)
def _continuous_bernoulli(d: Any) -> ExponentialFamily:
    log_z = softplus(d.logits) - d._cont_bern_log_norm()
    return ExponentialFamily((d.logits,), lambda x: (x,), log_z, _zero_base)


@register_exponential_family(td.Binomial)
def _binomial(d: Any) -> ExponentialFamily:
    n = torch.as_tensor(d.total_count)

    def log_base(x: Tensor) -> Tensor:
        return torch.lgamma(n + 1.0) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)

    return ExponentialFamily((d.logits,), lambda x: (x,), n * softplus(d.logits), log_base, (n,))


@register_exponential_family(td.NegativeBinomial)
def _negative_binomial(d: Any) -> ExponentialFamily:
    r = torch.as_tensor(d.total_count)

    def log_base(x: Tensor) -> Tensor:
        return torch.lgamma(x + r) - torch.lgamma(x + 1) - torch.lgamma(r)

    return ExponentialFamily(
        (logsigmoid(d.logits),), lambda x: (x,), -r * logsigmoid(-d.logits), log_base, (r,)
    )


@register_exponential_family(td.Geometric)
def _geometric(d: Any) -> ExponentialFamily:
    return ExponentialFamily(
        (logsigmoid(-d.logits),), lambda x: (x,), -logsigmoid(d.logits), _zero_base
    )


@register_exponential_family(td.Poisson)
def _poisson(d: Any) -> ExponentialFamily:
    log_rate = d.rate.clamp(min=torch.finfo(d.rate.dtype).tiny).log()
    return ExponentialFamily((log_rate,), lambda x: (x,), d.rate, lambda x: -torch.lgamma(x + 1))


@register_exponential_family(td.Categorical)
def _categorical(d: Any) -> ExponentialFamily:
    size = d.logits.shape[-1]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return (one_hot(x.long(), size).to(d.logits.dtype),)

    def log_base(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=d.logits.dtype, device=x.device)

    return ExponentialFamily((d.logits,), statistics, torch.zeros_like(d.logits[..., 0]), log_base)


@register_exponential_family(td.OneHotCategorical)
def _one_hot(d: Any) -> ExponentialFamily:
    log_z = torch.zeros_like(d.logits[..., 0])
    return ExponentialFamily((d.logits,), lambda x: (x,), log_z, _flat_base)


@register_exponential_family(td.Multinomial)
def _multinomial(d: Any) -> ExponentialFamily:
    def log_base(x: Tensor) -> Tensor:
        return torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)

    log_z = torch.zeros_like(d.logits[..., 0])
    n = torch.as_tensor(d.total_count)
    return ExponentialFamily((d.logits,), lambda x: (x,), log_z, log_base, (n,))


@register_exponential_family(td.Exponential)
def _exponential(d: Any) -> ExponentialFamily:
    return ExponentialFamily((-d.rate,), lambda x: (x,), -d.rate.log(), _zero_base)


@register_exponential_family(td.Gamma)
def _gamma(d: Any) -> ExponentialFamily:
    a, b = d.concentration, d.rate
    log_z = torch.lgamma(a) - a * b.log()
    return ExponentialFamily((a - 1, -b), lambda x: (x.log(), x), log_z, _zero_base)


@register_exponential_family(dist.InverseGamma)
def _inverse_gamma(d: Any) -> ExponentialFamily:
    a, b = d.concentration, d.rate
    log_z = torch.lgamma(a) - a * b.log()
    return ExponentialFamily((-a - 1, -b), lambda x: (x.log(), 1 / x), log_z, _zero_base)


@register_exponential_family(td.Beta)
def _beta(d: Any) -> ExponentialFamily:
    a, b = d.concentration1, d.concentration0
    log_z = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return ExponentialFamily((a - 1, b - 1), lambda x: (x.log(), (-x).log1p()), log_z, _zero_base)


@register_exponential_family(td.Dirichlet)
def _dirichlet(d: Any) -> ExponentialFamily:
    a = d.concentration
    log_z = torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))
    return ExponentialFamily((a - 1,), lambda x: (x.log(),), log_z, _flat_base)


@register_exponential_family(td.VonMises)
def _von_mises(d: Any) -> ExponentialFamily:
    k = d.concentration
    log_z = torch.special.i0e(k).log() + k
    return ExponentialFamily(
        (k * d.loc.cos(), k * d.loc.sin()),
        lambda x: (x.cos(), x.sin()),
        log_z,
        lambda x: torch.full_like(x, -2 * HALF_LOG_2PI),
    )


@register_exponential_family(td.MultivariateNormal)
def _multivariate_normal(d: Any) -> ExponentialFamily:
    tril = d._unbroadcasted_scale_tril
    precision = torch.cholesky_inverse(tril)
    first = (precision @ d.loc[..., None])[..., 0]
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _joint_normal(d, first, precision, log_det)


@register_exponential_family(td.LowRankMultivariateNormal)
def _low_rank_normal(d: Any) -> ExponentialFamily:
    precision = d.precision_matrix
    first = (precision @ d.loc[..., None])[..., 0]
    diagonal, factor = d._unbroadcasted_cov_diag, d._unbroadcasted_cov_factor
    scaled = factor / diagonal[..., None]
    inner = torch.eye(factor.shape[-1]).to(factor) + factor.mT @ scaled
    half = torch.linalg.cholesky(inner).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _joint_normal(d, first, precision, half + 0.5 * diagonal.log().sum(-1))


def _joint_normal(d: Any, first: Tensor, precision: Tensor, log_det: Tensor) -> ExponentialFamily:
    """η = (Pμ, −½P), s = (x, x xᵀ); ``log_det`` is half the covariance's."""
    log_z = (0.5 * (d.loc * first).sum(-1) + log_det).expand(d.batch_shape)
    base = -d.event_shape[0] * HALF_LOG_2PI

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return x, x[..., :, None] * x[..., None, :]

    natural = (first, -0.5 * precision)
    return ExponentialFamily(natural, statistics, log_z, lambda x: torch.full_like(x[..., 0], base))


@register_exponential_family(td.TransformedDistribution)
def _transformed(d: Any) -> ExponentialFamily | None:
    """The base's form at ``T⁻¹(x)``; the base measure takes the Jacobian."""
    if not all(_is_fixed(t) for t in d.transforms) or d.base_dist.event_shape:
        return None
    form = exponential_family(d.base_dist)
    if form is None:
        return None

    def inverse(x: Tensor) -> tuple[Tensor, Any]:
        log_jacobian: Any = 0.0
        for transform in reversed(d.transforms):
            source = transform.inv(x)
            log_jacobian = log_jacobian + transform.log_abs_det_jacobian(source, x)
            x = source
        return x, log_jacobian

    def log_base(x: Tensor) -> Tensor:
        source, log_jacobian = inverse(x)
        return form.log_base(source) - log_jacobian

    return replace(form, statistics=lambda x: form.statistics(inverse(x)[0]), log_base=log_base)


def _is_fixed(transform: Any) -> bool:
    if isinstance(transform, tt.ComposeTransform):
        return all(_is_fixed(part) for part in transform.parts)
    if isinstance(transform, tt.AffineTransform):
        numbers = (transform.loc, transform.scale)
        return transform.event_dim == 0 and not any(torch.is_tensor(v) for v in numbers)
    return isinstance(
        transform, tt.ExpTransform | tt.SigmoidTransform | tt.TanhTransform | tt.SoftplusTransform
    )


__all__ = ["ExponentialFamily", "exponential_family", "register_exponential_family"]
