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

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import log_sigmoid, log_softmax, softplus
from jax.scipy.linalg import cho_solve
from jax.scipy.special import gammaln, i0e
from numpyro.distributions import transforms as nt

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass
class ExponentialFamily:
    """One distribution, or a batch of them, in its natural form.

    ``batch`` is the batch shape with the dimensions that ``to_event`` reinterprets.

    Attributes:
        natural: η, one array (*batch, *statistic) for each statistic. Leading dimensions of
            size 1 stand for equal values and may be missing.
        statistics: s, from a value to as many arrays (*batch, *statistic).
        log_normaliser: log Z, (*batch,), likewise.
        log_base: log h, from a value to (*batch,). It must not depend on any parameter.
        fixed: arguments that the base measure or the statistics use, (*batch,). The form holds
            only where they have no gradient and do not differ between the dreams.
    """

    natural: tuple[Array, ...]
    statistics: Callable[[Array], tuple[Array, ...]]
    log_normaliser: Array
    log_base: Callable[[Array], Array]
    fixed: tuple[Any, ...] = ()


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
    fixed elementwise bijections (exp, sigmoid, softplus, a power or affine with numbers).
    """
    if isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        return exponential_family(fn.base_dist)
    for cls in type(fn).__mro__:
        if cls in _RULES:
            return _RULES[cls](fn)
    return None


def _zero_base(value: Array) -> Array:
    return jnp.zeros(jnp.shape(value))


def _flat_base(value: Array) -> Array:
    return jnp.zeros(jnp.shape(value)[:-1])


def _constant_base(number: float) -> Callable[[Array], Array]:
    return lambda value: jnp.full(jnp.shape(value), number)


@register_exponential_family(dist.Normal)
def _normal(d: Any) -> ExponentialFamily:
    loc, scale = jnp.asarray(d.loc), jnp.asarray(d.scale)
    precision = scale**-2.0
    return ExponentialFamily(
        (loc * precision, -0.5 * precision),
        lambda x: (x, x**2),
        0.5 * loc**2 * precision + jnp.log(scale),
        _constant_base(-HALF_LOG_2PI),
    )


@register_exponential_family(dist.HalfNormal)
def _half_normal(d: Any) -> ExponentialFamily:
    scale = jnp.asarray(d.scale)
    base = _constant_base(math.log(2) - HALF_LOG_2PI)
    return ExponentialFamily((-0.5 * scale**-2.0,), lambda x: (x**2,), jnp.log(scale), base)


def _logit(probs: Array) -> Array:
    return jnp.log(probs) - jnp.log1p(-probs)


def _clamped(probs: Any) -> Array:
    """Probabilities away from 0 and 1, as the host clamps them."""
    probs = jnp.asarray(probs)
    finfo = jnp.finfo(jnp.result_type(probs, jnp.float32))
    return jnp.clip(probs, finfo.tiny, 1.0 - finfo.eps)


@register_exponential_family(dist.BernoulliLogits)
def _bernoulli_logits(d: Any) -> ExponentialFamily:
    logits = jnp.asarray(d.logits)
    return ExponentialFamily((logits,), lambda x: (x,), softplus(logits), _zero_base)


@register_exponential_family(dist.BernoulliProbs)
def _bernoulli_probs(d: Any) -> ExponentialFamily:
    probs = _clamped(d.probs)
    return ExponentialFamily((_logit(probs),), lambda x: (x,), -jnp.log1p(-probs), _zero_base)


def _binomial(d: Any, logits: Array, softened: Array) -> ExponentialFamily:
    n = d.total_count

    def log_base(x: Array) -> Array:
        return gammaln(n + 1.0) - gammaln(x + 1.0) - gammaln(n - x + 1.0)

    return ExponentialFamily((logits,), lambda x: (x,), n * softened, log_base, (n,))


@register_exponential_family(dist.BinomialLogits)
def _binomial_logits(d: Any) -> ExponentialFamily:
    logits = jnp.asarray(d.logits)
    return _binomial(d, logits, softplus(logits))


@register_exponential_family(dist.BinomialProbs)
def _binomial_probs(d: Any) -> ExponentialFamily:
    probs = _clamped(d.probs)
    return _binomial(d, _logit(probs), -jnp.log1p(-probs))


def _negative_binomial(r: Any, log_p: Array, log_q: Array) -> ExponentialFamily:
    """``p^x q^r``, log p and log q given."""

    def log_base(x: Array) -> Array:
        return gammaln(x + r) - gammaln(x + 1.0) - gammaln(r)

    return ExponentialFamily((log_p,), lambda x: (x,), -r * log_q, log_base, (r,))


@register_exponential_family(dist.NegativeBinomialLogits)
def _negative_binomial_logits(d: Any) -> ExponentialFamily:
    return _negative_binomial(d.total_count, log_sigmoid(d.logits), log_sigmoid(-d.logits))


@register_exponential_family(dist.GammaPoisson)
def _gamma_poisson(d: Any) -> ExponentialFamily:
    # NegativeBinomialProbs and NegativeBinomial2 are subclasses.
    log_rate = jnp.log(d.rate)
    return _negative_binomial(d.concentration, -softplus(log_rate), log_sigmoid(log_rate))


@register_exponential_family(dist.GeometricLogits)
def _geometric_logits(d: Any) -> ExponentialFamily:
    return ExponentialFamily(
        (log_sigmoid(-d.logits),), lambda x: (x,), -log_sigmoid(d.logits), _zero_base
    )


@register_exponential_family(dist.GeometricProbs)
def _geometric_probs(d: Any) -> ExponentialFamily:
    return ExponentialFamily((jnp.log1p(-d.probs),), lambda x: (x,), -jnp.log(d.probs), _zero_base)


@register_exponential_family(dist.Poisson)
def _poisson(d: Any) -> ExponentialFamily:
    rate = jnp.asarray(d.rate)
    log_rate = jnp.log(jnp.maximum(rate, jnp.finfo(jnp.result_type(rate, jnp.float32)).tiny))
    return ExponentialFamily((log_rate,), lambda x: (x,), rate, lambda x: -gammaln(x + 1.0))


def _categorical(log_probs: Array) -> ExponentialFamily:
    def statistics(x: Array) -> tuple[Array, ...]:
        return (jax.nn.one_hot(x, log_probs.shape[-1], dtype=log_probs.dtype),)

    return ExponentialFamily((log_probs,), statistics, jnp.zeros(log_probs.shape[:-1]), _zero_base)


@register_exponential_family(dist.CategoricalLogits)
def _categorical_logits(d: Any) -> ExponentialFamily:
    return _categorical(log_softmax(d.logits, -1))


@register_exponential_family(dist.CategoricalProbs)
def _categorical_probs(d: Any) -> ExponentialFamily:
    return _categorical(d.logits)


def _multinomial(log_probs: Array, count: Any) -> ExponentialFamily:
    def log_base(x: Array) -> Array:
        return gammaln(x.sum(-1) + 1.0) - gammaln(x + 1.0).sum(-1)

    log_z = jnp.zeros(log_probs.shape[:-1])
    return ExponentialFamily((log_probs,), lambda x: (x,), log_z, log_base, (count,))


@register_exponential_family(dist.MultinomialLogits)
def _multinomial_logits(d: Any) -> ExponentialFamily:
    return _multinomial(log_softmax(d.logits, -1), d.total_count)


@register_exponential_family(dist.MultinomialProbs)
def _multinomial_probs(d: Any) -> ExponentialFamily:
    return _multinomial(jnp.log(_clamped(d.probs)), d.total_count)


@register_exponential_family(dist.Exponential)
def _exponential(d: Any) -> ExponentialFamily:
    rate = jnp.asarray(d.rate)
    return ExponentialFamily((-rate,), lambda x: (x,), -jnp.log(rate), _zero_base)


@register_exponential_family(dist.Gamma)
def _gamma(d: Any) -> ExponentialFamily:
    a, b = jnp.asarray(d.concentration), jnp.asarray(d.rate)
    log_z = gammaln(a) - a * jnp.log(b)
    return ExponentialFamily((a - 1, -b), lambda x: (jnp.log(x), x), log_z, _zero_base)


@register_exponential_family(dist.InverseGamma)
def _inverse_gamma(d: Any) -> ExponentialFamily:
    a, b = jnp.asarray(d.concentration), jnp.asarray(d.rate)
    log_z = gammaln(a) - a * jnp.log(b)
    return ExponentialFamily((-a - 1, -b), lambda x: (jnp.log(x), 1 / x), log_z, _zero_base)


@register_exponential_family(dist.Beta)
def _beta(d: Any) -> ExponentialFamily:
    a, b = jnp.asarray(d.concentration1), jnp.asarray(d.concentration0)
    log_z = gammaln(a) + gammaln(b) - gammaln(a + b)
    return ExponentialFamily(
        (a - 1, b - 1), lambda x: (jnp.log(x), jnp.log1p(-x)), log_z, _zero_base
    )


@register_exponential_family(dist.Dirichlet)
def _dirichlet(d: Any) -> ExponentialFamily:
    a = jnp.asarray(d.concentration)
    log_z = gammaln(a).sum(-1) - gammaln(a.sum(-1))
    return ExponentialFamily((a - 1,), lambda x: (jnp.log(x),), log_z, _flat_base)


@register_exponential_family(dist.VonMises)
def _von_mises(d: Any) -> ExponentialFamily:
    loc, k = jnp.asarray(d.loc), jnp.asarray(d.concentration)
    return ExponentialFamily(
        (k * jnp.cos(loc), k * jnp.sin(loc)),
        lambda x: (jnp.cos(x), jnp.sin(x)),
        jnp.log(i0e(k)) + k,
        _constant_base(-2 * HALF_LOG_2PI),
    )


@register_exponential_family(dist.MultivariateNormal)
def _multivariate_normal(d: Any) -> ExponentialFamily:
    tril = d.scale_tril
    eye = jnp.broadcast_to(jnp.eye(tril.shape[-1], dtype=tril.dtype), tril.shape)
    log_det = jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)).sum(-1)
    return _joint_normal(d, cho_solve((tril, True), eye), log_det)


@register_exponential_family(dist.LowRankMultivariateNormal)
def _low_rank_normal(d: Any) -> ExponentialFamily:
    # Woodbury: P = D⁻¹ − D⁻¹W C⁻¹ WᵀD⁻¹ with C = I + WᵀD⁻¹W.
    diagonal, factor = d.cov_diag, d.cov_factor
    scaled = factor / diagonal[..., None]
    inner = jnp.eye(factor.shape[-1], dtype=factor.dtype) + factor.mT @ scaled
    tril = jnp.linalg.cholesky(inner)
    half = jax.lax.linalg.triangular_solve(tril, scaled.mT, left_side=True, lower=True)
    precision = _diagonal(1 / diagonal) - half.mT @ half
    log_det = jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)).sum(-1)
    return _joint_normal(d, precision, log_det + 0.5 * jnp.log(diagonal).sum(-1))


def _diagonal(x: Array) -> Array:
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def _joint_normal(d: Any, precision: Array, log_det: Array) -> ExponentialFamily:
    """η = (Pμ, −½P), s = (x, x xᵀ); ``log_det`` is half the covariance's."""
    first = (precision @ d.loc[..., None])[..., 0]
    base = -d.event_shape[0] * HALF_LOG_2PI
    return ExponentialFamily(
        (first, -0.5 * precision),
        lambda x: (x, x[..., :, None] * x[..., None, :]),
        0.5 * (d.loc * first).sum(-1) + log_det,
        lambda x: jnp.full(jnp.shape(x)[:-1], base),
    )


@register_exponential_family(dist.TransformedDistribution)
def _transformed(d: Any) -> ExponentialFamily | None:
    """The base's form at ``T⁻¹(x)``; the base measure takes the Jacobian."""
    if not all(_is_fixed(t) for t in d.transforms) or d.base_dist.event_shape:
        return None
    form = exponential_family(d.base_dist)
    if form is None:
        return None

    def inverse(x: Array) -> tuple[Array, Any]:
        log_jacobian: Any = 0.0
        for transform in reversed(d.transforms):
            source = transform.inv(x)
            log_jacobian = log_jacobian + transform.log_abs_det_jacobian(source, x)
            x = source
        return x, log_jacobian

    def log_base(x: Array) -> Array:
        source, log_jacobian = inverse(x)
        return form.log_base(source) - log_jacobian

    return replace(form, statistics=lambda x: form.statistics(inverse(x)[0]), log_base=log_base)


def _is_fixed(transform: Any) -> bool:
    """Whether a transform is elementwise and its arguments are numbers."""
    if isinstance(transform, nt.ComposeTransform):
        return all(_is_fixed(part) for part in transform.parts)
    if isinstance(transform, nt.AffineTransform):
        return all(isinstance(v, int | float) for v in (transform.loc, transform.scale))
    if isinstance(transform, nt.PowerTransform):
        return isinstance(transform.exponent, int | float)
    return isinstance(transform, nt.ExpTransform | nt.SigmoidTransform | nt.SoftplusTransform)


__all__ = ["ExponentialFamily", "exponential_family", "register_exponential_family"]
