"""Distributions with reparameterised samples that NumPyro lacks.

``RankOnePrecisionNormal`` is the guide of deep latent Gaussian models (Rezende, Mohamed and
Wierstra 2014, section 4.3): all of its work is linear in the dimension. The others are the
coordinate transforms of the paper's appendix C.2 that NumPyro does not have or does not
differentiate; it has ``Logistic``, ``Weibull``, ``Gumbel`` and ``StudentT``.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.scipy.special import gammaln
from numpyro.distributions import constraints, kl_divergence
from numpyro.distributions.util import lazy_property, promote_shapes, validate_sample
from scipy.special import zeta

from .fisher.families import unwrap
from .fisher.registry import Information, register_fisher

LOG_2PI = math.log(2 * math.pi)
SHAPES_OF = "loc, precision_factor and precision_diag"


class RankOnePrecisionNormal(dist.Distribution):
    """The normal distribution of precision ``diag(D) + u uᵀ``.

    With ``η = 1 / (1 + uᵀD⁻¹u)`` the covariance is ``C = D⁻¹ − η D⁻¹u uᵀD⁻¹ = R Rᵀ`` with
    ``R = D^(−½) − η/(1+√η) · D⁻¹u uᵀD^(−½)``, and ``log|C| = log η − log|D|`` (equations 17 and
    18). Samples, densities and entropies take time and memory linear in d.

    Args:
        loc: mean μ, (*batch, d). precision_factor: u, (*batch, d).
        precision_diag: D, (*batch, d), positive. The batch shapes broadcast.

    Raises:
        ValueError: an argument without an event dimension, or sizes that differ.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "precision_factor": constraints.real_vector,
        "precision_diag": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    reparametrized_params = ["loc", "precision_factor", "precision_diag"]

    def __init__(
        self,
        loc: Any,
        precision_factor: Any,
        precision_diag: Any,
        *,
        validate_args: bool | None = None,
    ) -> None:
        shapes = [jnp.shape(x) for x in (loc, precision_factor, precision_diag)]
        if not all(shapes) or len({shape[-1] for shape in shapes}) > 1:
            raise ValueError(
                f"RankOnePrecisionNormal needs {SHAPES_OF} with the same last dimension, got "
                f"shapes {shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        full = lax.broadcast_shapes(*shapes)
        self.loc, self.precision_factor, self.precision_diag = promote_shapes(
            loc, precision_factor, precision_diag
        )
        super().__init__(full[:-1], full[-1:], validate_args=validate_args)

    @lazy_property
    def _scaled(self) -> Array:
        """``D⁻¹u``, (*batch, d)."""
        return self.precision_factor / self.precision_diag

    @lazy_property
    def _inflation(self) -> Array:
        """``1/η = 1 + uᵀD⁻¹u``, (*batch, 1)."""
        return 1 + (self._scaled * self.precision_factor).sum(-1, keepdims=True)

    def root(self, v: Any) -> Array:
        """``R v`` for v of shape (..., d)."""
        scaled = v / jnp.sqrt(self.precision_diag)
        along = (self.precision_factor * scaled).sum(-1, keepdims=True)
        return scaled - self._scaled * along / (self._inflation + jnp.sqrt(self._inflation))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """``μ + R ε`` with standard normal ε."""
        return self.loc + self.root(random.normal(key, self.shape(sample_shape)))

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        """``−½ [Σ D (x−μ)² + (uᵀ(x−μ))² + log|C| + d log 2π]``."""
        away = value - self.loc
        square = (self.precision_diag * away**2).sum(-1)
        along = (self.precision_factor * away).sum(-1)
        return -0.5 * (square + along**2 + self._log_det() + self.event_shape[0] * LOG_2PI)

    def _log_det(self) -> Array:
        """``log|C|``, (*batch)."""
        return -jnp.log(self._inflation)[..., 0] - jnp.log(self.precision_diag).sum(-1)

    def entropy(self) -> Array:
        """``½ [log|C| + d (1 + log 2π)]``."""
        entropy = 0.5 * (self._log_det() + self.event_shape[0] * (1 + LOG_2PI))
        return jnp.broadcast_to(entropy, self.batch_shape)

    @property
    def mean(self) -> Array:
        """μ."""
        return jnp.broadcast_to(self.loc, self.shape())

    @property
    def variance(self) -> Array:
        """The diagonal of C."""
        variance = 1 / self.precision_diag - self._scaled**2 / self._inflation
        return jnp.broadcast_to(variance, self.shape())

    @property
    def precision_matrix(self) -> Array:
        """``diag(D) + u uᵀ``, (*batch, d, d)."""
        u = self.precision_factor
        return (
            self.precision_diag[..., None] * jnp.eye(u.shape[-1]) + u[..., None] * u[..., None, :]
        )

    @property
    def covariance_matrix(self) -> Array:
        """C, (*batch, d, d)."""
        v, eye = self._scaled, jnp.eye(self.event_shape[0])
        outer = v[..., None] * v[..., None, :]
        return eye / self.precision_diag[..., None] - outer / self._inflation[..., None]


@register_fisher(RankOnePrecisionNormal)
def _rank_one(d: RankOnePrecisionNormal) -> Information:
    """That of the mean; two coupled vectors (u, D) are beyond the registry's forms."""
    return {"loc": d.precision_matrix}


@kl_divergence.register(RankOnePrecisionNormal, dist.Independent)
def _kl_to_normal(p: RankOnePrecisionNormal, q: dist.Independent) -> Array:
    """To independent normals, ``½ Σ [(C_ii + (μ−m)²)/s² − 1 + log s²] − ½ log|C|``."""
    if not isinstance(unwrap(q).fn, dist.Normal) or len(q.event_shape) != 1 or unwrap(q).transforms:
        raise NotImplementedError
    square = (p.variance + (p.mean - q.mean) ** 2) / q.variance
    return 0.5 * ((square - 1 + jnp.log(q.variance)).sum(-1) - p._log_det())


@kl_divergence.register(RankOnePrecisionNormal, RankOnePrecisionNormal)
def _kl_of_rank_one(p: RankOnePrecisionNormal, q: RankOnePrecisionNormal) -> Array:
    """``½ [tr(Q C) + (μ−m)ᵀQ(μ−m) − d + log|C_q| − log|C|]`` with Q the precision of q."""
    u, away = q.precision_factor, p.loc - q.loc
    across = (u**2 / p.precision_diag).sum(-1) - (u * p._scaled).sum(-1) ** 2 / p._inflation[..., 0]
    trace = (q.precision_diag * (p.variance + away**2)).sum(-1) + across
    square = (u * away).sum(-1) ** 2
    return 0.5 * (trace + square - p.event_shape[0] + q._log_det() - p._log_det())


class Levy(dist.Levy):
    """The Lévy distribution with differentiable samples ``μ + c / Z²``, Z standard normal.

    NumPyro's own does not count as reparameterised, and draws ``μ`` itself, where the density is
    0, whenever its uniform number is 0.

    Args:
        loc: μ. scale: c, positive.
    """

    reparametrized_params = ["loc", "scale"]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """``μ + c / Z²``."""
        return self.loc + self.scale / random.normal(key, self.shape(sample_shape)) ** 2


class GeneralizedExtremeValue(dist.Distribution):
    """The generalised extreme value distribution, ``F(x) = exp(−(1 + ξ(x−μ)/σ)^(−1/ξ))``.

    A sample is ``μ + σ (e^{ξt} − 1)/ξ`` with t from the standard Gumbel distribution, which is
    the limit ξ = 0; values and derivatives are continuous there. The sign of ξ is that of
    heavy upper tails for ξ > 0 (scipy's ``genextreme`` has ``c = −ξ``).

    Args:
        loc: μ. scale: σ, positive. concentration: ξ.
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "concentration": constraints.real,
    }
    reparametrized_params = ["loc", "scale", "concentration"]

    def __init__(
        self,
        loc: Any,
        scale: Any,
        concentration: Any,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.concentration = promote_shapes(loc, scale, concentration)
        shapes = map(jnp.shape, (loc, scale, concentration))
        super().__init__(lax.broadcast_shapes(*shapes), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """From or up to ``μ − σ/ξ``, as ξ is positive or negative."""
        shape = jnp.asarray(self.concentration)
        end = self.loc - self.scale / jnp.where(shape == 0, 1, shape)
        lower, upper = jnp.where(shape > 0, end, -jnp.inf), jnp.where(shape < 0, end, jnp.inf)
        return constraints.interval(lower, upper)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """A transformed draw from the standard Gumbel distribution."""
        return self._from_gumbel(random.gumbel(key, self.shape(sample_shape)))

    def _from_gumbel(self, t: Any) -> Array:
        return self.loc + self.scale * t * _expm1_ratio(self.concentration * t)

    def _to_gumbel(self, value: Any) -> tuple[Array, Array]:
        """``t = log(1 + ξz)/ξ``, ``z = (x−μ)/σ``, and whether x is inside the support."""
        z = (value - self.loc) / self.scale
        inside = 1 + self.concentration * z > 0
        z = jnp.where(inside, z, 0)
        return z * _log1p_ratio(self.concentration * z), inside

    def log_prob(self, value: Any) -> Array:
        """``−log σ − (1+ξ) t − e^{−t}``; minus infinity outside the support."""
        t, inside = self._to_gumbel(value)
        density = -jnp.log(self.scale) - (1 + self.concentration) * t - jnp.exp(-t)
        return jnp.where(inside, density, -jnp.inf)

    def cdf(self, value: Any) -> Array:
        """``exp(−e^{−t})``."""
        t, inside = self._to_gumbel(value)
        beyond = jnp.where(jnp.asarray(self.concentration) > 0, 0.0, 1.0)
        return jnp.where(inside, jnp.exp(-jnp.exp(-t)), beyond)

    def icdf(self, q: Any) -> Array:
        """The inverse of ``cdf``."""
        return self._from_gumbel(-jnp.log(-jnp.log(q)))

    def entropy(self) -> Array:
        """``log σ + γ(1+ξ) + 1``."""
        entropy = jnp.log(self.scale) + jnp.euler_gamma * (1 + self.concentration) + 1
        return jnp.broadcast_to(entropy, self.batch_shape)

    @property
    def mean(self) -> Array:
        """``μ + σ (Γ(1−ξ) − 1)/ξ`` for ξ < 1, else infinite."""
        shape = jnp.asarray(self.concentration)
        finite = jnp.where(shape < 1, shape, 0.0)
        slope = _log_gamma_ratio(finite, 1)
        mean = self.loc + self.scale * slope * _expm1_ratio(finite * slope)
        return jnp.broadcast_to(jnp.where(shape < 1, mean, jnp.inf), self.batch_shape)

    @property
    def variance(self) -> Array:
        """``σ² (Γ(1−2ξ) − Γ(1−ξ)²)/ξ²`` for ξ < ½, else infinite."""
        shape = jnp.asarray(self.concentration)
        finite = jnp.where(shape < 0.5, shape, 0.0)
        bend = _log_gamma_ratio(finite, 2)
        square = jnp.exp(2 * finite * _log_gamma_ratio(finite, 1))
        variance = self.scale**2 * square * bend * _expm1_ratio(finite**2 * bend)
        return jnp.broadcast_to(jnp.where(shape < 0.5, variance, jnp.inf), self.batch_shape)


class Stable(dist.Distribution):
    """The stable distribution: reparameterised samples alone, for its density has no closed form.

    Samples are Chambers, Mallows and Stuck's transform of a uniform angle V and an exponential W,
    in Nolan's coordinates S0, where they are continuous in α and β; within 0.01 of α = 1 they
    interpolate between α = 0.99 and α = 1.01. In the coordinates "S", as in scipy, the location
    jumps at α = 1. A site of the guide needs a density, so it cannot be of this family.

    Args:
        stability: α, in (0, 2]. skew: β, in [−1, 1]. scale: σ, positive. loc: μ.
        coords: "S0" or "S".

    Raises:
        ValueError: other coordinates.
    """

    arg_constraints = {
        "stability": constraints.interval(0, 2),
        "skew": constraints.interval(-1, 1),
        "scale": constraints.positive,
        "loc": constraints.real,
    }
    support = constraints.real
    reparametrized_params = ["stability", "skew", "scale", "loc"]
    pytree_aux_fields = ("coords",)

    def __init__(
        self,
        stability: Any,
        skew: Any,
        scale: Any = 1.0,
        loc: Any = 0.0,
        coords: str = "S0",
        *,
        validate_args: bool | None = None,
    ) -> None:
        if coords not in ("S0", "S"):
            raise ValueError(f"coords must be 'S0' or 'S', got {coords!r}.")
        self.coords = coords
        given = (stability, skew, scale, loc)
        self.stability, self.skew, self.scale, self.loc = promote_shapes(*given)
        shape = lax.broadcast_shapes(*map(jnp.shape, given))
        super().__init__(shape, validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """``μ + σ Z``."""
        angle_key, length_key = random.split(key)
        shape = self.shape(sample_shape)
        tiny = float(jnp.finfo(jnp.result_type(float)).eps)
        bound = math.pi / 2 * (1 - 4 * tiny)
        angle = random.uniform(angle_key, shape, minval=-bound, maxval=bound)
        length = jnp.maximum(random.exponential(length_key, shape), tiny**2)
        alpha, beta = jnp.asarray(self.stability), jnp.asarray(self.skew)
        z = _stable_across_one(alpha, beta, angle, length)
        if self.coords == "S":
            z = z + jnp.where(alpha == 1, 0, beta * jnp.tan(math.pi / 2 * alpha))
        return self.loc + self.scale * z

    def log_prob(self, value: Any) -> Array:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the density of Stable has no closed form. It can be sampled, differentiably; a site "
            "whose log-density is asked for needs another family, such as Levy (α = ½, β = 1), "
            "Cauchy (α = 1) or Normal (α = 2)."
        )


def _stable_across_one(alpha: Array, beta: Array, angle: Array, length: Array) -> Array:
    """A standard stable sample in S0, interpolated near α = 1."""
    near = jnp.abs(alpha - 1) <= 0.01
    lower, upper = jnp.where(near, 0.99, alpha), jnp.where(near, 1.01, alpha)
    share = jnp.where(near, (alpha - 0.99) / 0.02, 0.5)
    at_lower = _stable(lower, beta, angle, length)
    return (1 - share) * at_lower + share * _stable(upper, beta, angle, length)


def _stable(alpha: Array, beta: Array, angle: Array, length: Array) -> Array:
    """Chambers, Mallows and Stuck (1976) as Weron (1996) corrects it, in S0; α not 1."""
    half = math.pi / 2 * alpha
    b = beta * jnp.tan(half)
    turned = jnp.arctan(b) - half + alpha * (angle + math.pi / 2)
    tiny = jnp.finfo(angle.dtype).eps
    stretch = (jnp.sqrt(1 + b**2) / jnp.cos(angle)) ** (1 / alpha)
    rest = jnp.maximum(jnp.cos(turned - angle), tiny) / length
    return jnp.sin(turned) * stretch * rest ** (1 / alpha - 1) - b


def _small(x: Array, bound: float, series: list[float], outside: Any) -> Array:
    """A power series near 0, and a function elsewhere that need not be smooth at 0."""
    near = jnp.abs(x) < bound
    inner, outer = jnp.where(near, x, 0), jnp.where(near, bound, x)
    total = jnp.zeros_like(inner)
    for coefficient in reversed(series):
        total = total * inner + coefficient
    return jnp.where(near, total, outside(outer))


def _expm1_ratio(x: Any) -> Array:
    """``(e^x − 1)/x``, 1 at 0."""
    series = [1 / math.factorial(k + 1) for k in range(14)]
    return _small(jnp.asarray(x), 0.1, series, lambda x: jnp.expm1(x) / x)


def _log1p_ratio(x: Any) -> Array:
    """``log(1 + x)/x``, 1 at 0."""
    series = [(-1) ** k / (k + 1) for k in range(16)]
    return _small(jnp.asarray(x), 0.05, series, lambda x: jnp.log1p(x) / x)


def _log_gamma_ratio(x: Any, order: int) -> Array:
    """``log Γ(1−x)/x`` or, of order 2, ``[log Γ(1−2x) − 2 log Γ(1−x)]/x²``."""
    powers = range(2, 18)
    zetas = [float(zeta(k)) for k in powers]
    if order == 1:
        series = [jnp.euler_gamma] + [z / k for z, k in zip(zetas, powers, strict=True)]
        return _small(jnp.asarray(x), 0.05, series, lambda x: gammaln(1 - x) / x)
    series = [(2**k - 2) / k * z for z, k in zip(zetas, powers, strict=True)]

    def outside(x: Array) -> Array:
        return (gammaln(1 - 2 * x) - 2 * gammaln(1 - x)) / x**2

    return _small(jnp.asarray(x), 0.05, series, outside)


__all__ = ["GeneralizedExtremeValue", "Levy", "RankOnePrecisionNormal", "Stable"]
