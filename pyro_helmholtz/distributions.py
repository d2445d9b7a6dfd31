"""Reparameterised distributions that the host lacks (Rezende, Mohamed and Wierstra 2014).

``RankOnePrecisionNormal`` is the recognition model of section 4.3 and equation (24);
``GeneralizedExtremeValue`` and ``Levy`` are among the coordinate transformations of appendix
C.2. The others of that appendix are the host's own: ``Logistic``, ``Weibull``, ``StudentT``,
``Gumbel``, ``Stable``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Stable
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all

from .fisher.registry import Information, register_fisher

__all__ = ["GeneralizedExtremeValue", "Levy", "RankOnePrecisionNormal", "Stable"]

EULER = 0.5772156649015329
LOG_SERIES = tuple((-1.0) ** k / (k + 1) for k in range(8))  # of log(1 + w)/w
EXP_SERIES = tuple(1.0 / math.factorial(k + 1) for k in range(8))  # of (e^w − 1)/w


class RankOnePrecisionNormal(TorchDistribution):
    """Normal vector with precision ``C⁻¹ = diag(D) + u uᵀ``; everything costs O(d).

    With ``s = Σ u²/D`` and ``η = 1/(1 + s)``::

        C = D⁻¹ − η D⁻¹u uᵀD⁻¹,   log|C| = log η − Σ log D,
        R = D^-½ − η/(1 + √η) D⁻¹u uᵀD^-½,   R Rᵀ = C,   x = loc + R ε

    since ``(1 − √η)/s = η/(1 + √η)``, which holds at ``u = 0`` too.

    Args:
        loc: mean, shape (..., d). precision_factor: u, (..., d).
        precision_diag: D > 0, (..., d).

    Raises:
        ValueError: arguments that do not broadcast or that validation refuses.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "precision_factor": constraints.real_vector,
        "precision_diag": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Any,
        precision_factor: Any,
        precision_diag: Any,
        *,
        validate_args: bool | None = None,
    ) -> None:
        parts = broadcast_all(loc, precision_factor, precision_diag)
        self.loc, self.precision_factor, self.precision_diag = parts
        if self.loc.ndim < 1:
            raise ValueError("the arguments must be at least one-dimensional, got scalars.")
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RankOnePrecisionNormal:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(RankOnePrecisionNormal, _instance)
        shape = torch.Size(batch_shape) + self.event_shape
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(shape))
        super(RankOnePrecisionNormal, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @property
    def _spread(self) -> Tensor:
        """``s = uᵀ D⁻¹ u``, batch shape."""
        return (self.precision_factor.square() / self.precision_diag).sum(-1)

    @property
    def log_det(self) -> Tensor:
        """``log|C|``, batch shape."""
        return -torch.log1p(self._spread) - self.precision_diag.log().sum(-1)

    def root(self, v: Tensor) -> Tensor:
        """``R v`` for a vector (..., d), differentiable in ``u`` and ``D``."""
        eta = 1 / (1 + self._spread)
        white = v * self.precision_diag.rsqrt()
        along = (self.precision_factor * white).sum(-1)
        factor = (eta / (1 + eta.sqrt()) * along).unsqueeze(-1)
        return white - factor * self.precision_factor / self.precision_diag

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``loc + R ε``, shape sample + batch + (d,)."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)),
            dtype=self.loc.dtype,
            device=self.loc.device,
        )
        return self.loc + self.root(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        diff = value - self.loc
        quadratic = (self.precision_diag * diff.square()).sum(-1)
        quadratic = quadratic + (self.precision_factor * diff).sum(-1).square()
        return -0.5 * (self.loc.shape[-1] * math.log(2 * math.pi) + self.log_det + quadratic)

    def entropy(self) -> Tensor:
        """``½ (d (1 + log 2π) + log|C|)``, batch shape."""
        return 0.5 * (self.loc.shape[-1] * (1 + math.log(2 * math.pi)) + self.log_det)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The diagonal of C, shape (..., d)."""
        share = self.precision_factor.square() / self.precision_diag
        eta = 1 / (1 + self._spread)
        return (1 - eta.unsqueeze(-1) * share) / self.precision_diag

    @property
    def precision_matrix(self) -> Tensor:
        """``diag(D) + u uᵀ``, shape (..., d, d)."""
        u = self.precision_factor
        return torch.diag_embed(self.precision_diag) + u.unsqueeze(-1) * u.unsqueeze(-2)

    @property
    def covariance_matrix(self) -> Tensor:
        """``C``, shape (..., d, d)."""
        along = self.precision_factor / self.precision_diag
        outer = along.unsqueeze(-1) * along.unsqueeze(-2)
        eta = (1 / (1 + self._spread))[..., None, None]
        return torch.diag_embed(1 / self.precision_diag) - eta * outer


@register_fisher(RankOnePrecisionNormal)
def _rank_one(d: Any) -> Information:
    """The location's information is the precision; u and D are coupled and left out."""
    return {"loc": d.precision_matrix.detach()}


@register_kl(RankOnePrecisionNormal, torch.distributions.Independent)
def _kl_rank_one_normal(p: RankOnePrecisionNormal, q: Any) -> Tensor:
    """``½ Σ [(C_ii + (μ−m)²)/σ² − 1 + log σ²] − ½ log|C|`` (the bracket of equation 45)."""
    base = q.base_dist
    if not isinstance(base, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError("only to a Normal with one event dimension.")
    scale2 = base.scale.square()
    terms = (p.variance + (p.loc - base.loc).square()) / scale2 - 1 + scale2.log()
    return 0.5 * (terms.sum(-1) - p.log_det)


class _ExtremeSupport(constraints.Constraint):
    """``1 + ξ (x − μ)/σ > 0``."""

    def __init__(self, d: Any) -> None:
        self.d = d
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        z = (value - self.d.loc) / self.d.scale
        return 1 + self.d.concentration * z > 0


class GeneralizedExtremeValue(TorchDistribution):
    """GEV(μ, σ, ξ), drawn as ``μ + σ (E^-ξ − 1)/ξ`` with ``E ~ Exp(1)`` (appendix C.2).

    ``ξ = 0`` is Gumbel's distribution, ``ξ > 0`` Fréchet's, ``ξ < 0`` the reversed Weibull;
    SciPy's ``genextreme`` has ``c = −ξ``. All are smooth in ξ across 0.

    Args:
        loc: μ. scale: σ > 0. concentration: ξ. They broadcast to the batch shape.
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "concentration": constraints.real,
    }
    has_rsample = True

    def __init__(
        self, loc: Any, scale: Any, concentration: Any, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.concentration = broadcast_all(loc, scale, concentration)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """``1 + ξ (x − μ)/σ > 0``."""
        return _ExtremeSupport(self)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GeneralizedExtremeValue:
        """The same distribution with a larger batch shape."""
        return _expand(self, GeneralizedExtremeValue, batch_shape, _instance)

    def _gumbel(self, value: Tensor) -> Tensor:
        """The value on Gumbel's scale: ``log(1 + ξz)/ξ``, z at ξ = 0; NaN off the support."""
        z = (value - self.loc) / self.scale
        return z * _ratio(torch.log1p, self.concentration * z, LOG_SERIES)

    def _from_gumbel(self, y: Tensor) -> Tensor:
        growth = _ratio(torch.expm1, self.concentration * y, EXP_SERIES)
        return self.loc + self.scale * y * growth

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A reparameterised draw, shape sample + batch."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).tiny
        noise = self.loc.new_empty(shape).exponential_().clamp(min=tiny)
        return self._from_gumbel(-noise.log())

    def log_prob(self, value: Tensor) -> Tensor:
        """``−log σ − (1 + ξ) y − e^-y``; −∞ off the support."""
        if self._validate_args:
            self._validate_sample(value)
        inside = self.support.check(value)
        y = self._gumbel(torch.where(inside, value, self.loc))
        density = -self.scale.log() - (1 + self.concentration) * y - (-y).exp()
        return torch.where(inside, density, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """``exp(−e^-y)``; 0 or 1 off the support."""
        inside = self.support.check(value)
        y = self._gumbel(torch.where(inside, value, self.loc))
        outside = (self.concentration < 0).to(y.dtype)
        return torch.where(inside, (-(-y).exp()).exp(), outside)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile."""
        return self._from_gumbel(-(-value.log()).log())

    @property
    def mean(self) -> Tensor:
        """``μ + σ (Γ(1−ξ) − 1)/ξ``; infinite from ξ = 1 on."""
        xi = self.concentration
        near = xi.abs() < 1e-4
        safe = torch.where(near | (xi >= 1), 0.5, xi)
        far = torch.expm1(torch.lgamma(1 - safe)) / safe
        series = EULER + xi * (EULER**2 + math.pi**2 / 6) / 2
        mean = torch.where(near, series, far)
        return torch.where(xi < 1, self.loc + self.scale * mean, math.inf)

    @property
    def variance(self) -> Tensor:
        """``σ² (Γ(1−2ξ) − Γ(1−ξ)²)/ξ²``; infinite from ξ = ½ on."""
        xi = self.concentration
        near = xi.abs() < 1e-3
        safe = torch.where(near | (xi >= 0.5), 0.25, xi)
        far = torch.lgamma(1 - 2 * safe) - 2 * torch.lgamma(1 - safe)
        zeta3, zeta4 = 1.2020569031595942, math.pi**4 / 90
        series = math.pi**2 / 6 + 2 * zeta3 * xi + 3.5 * zeta4 * xi**2
        log_ratio = torch.where(near, series * xi**2, far)
        at = torch.where(near, torch.where(xi == 0, 1.0, xi), safe)
        relative = torch.where(xi == 0, math.pi**2 / 6, torch.expm1(log_ratio) / at**2)
        first = (2 * torch.lgamma(1 - torch.where(near, xi, safe))).exp()
        return torch.where(xi < 0.5, self.scale.square() * first * relative, math.inf)

    def entropy(self) -> Tensor:
        """``log σ + γ ξ + γ + 1``."""
        return self.scale.log() + EULER * self.concentration + EULER + 1


class Levy(TorchDistribution):
    """Lévy's distribution, drawn as ``μ + c/ε²`` with a standard Normal ε (appendix C.2).

    It is stable with index ½ and has neither mean nor variance.

    Args:
        loc: μ, the lower end of the support. scale: c > 0. They broadcast to the batch shape.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(self, loc: Any, scale: Any, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """Values above the location."""
        return constraints.greater_than(self.loc)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Levy:
        """The same distribution with a larger batch shape."""
        return _expand(self, Levy, batch_shape, _instance)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A reparameterised draw, shape sample + batch."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        tiny = torch.finfo(self.loc.dtype).tiny
        return self.loc + self.scale / noise.square().clamp(min=tiny**0.5)

    def log_prob(self, value: Tensor) -> Tensor:
        """``½ log(c/2π) − 3/2 log(x−μ) − c/(2(x−μ))``; −∞ at and below μ."""
        if self._validate_args:
            self._validate_sample(value)
        inside = value > self.loc
        above = torch.where(inside, value - self.loc, 1.0)
        density = 0.5 * (self.scale / (2 * math.pi)).log() - 1.5 * above.log()
        return torch.where(inside, density - self.scale / (2 * above), -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """``erfc(√(c/(2(x−μ))))``."""
        inside = value > self.loc
        above = torch.where(inside, value - self.loc, 1.0)
        return torch.where(inside, torch.erfc((self.scale / (2 * above)).sqrt()), 0.0)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile."""
        return self.loc + self.scale / torch.special.ndtri(value / 2).square()

    @property
    def mean(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.loc, math.inf)

    @property
    def variance(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.loc, math.inf)

    def entropy(self) -> Tensor:
        """``½ (1 + 3γ + log(16 π c²))``."""
        return 0.5 * (1 + 3 * EULER + (16 * math.pi * self.scale.square()).log())


def _expand(d: Any, cls: type, batch_shape: Any, instance: Any) -> Any:
    """A distribution of scalar arguments with a larger batch shape."""
    new = d._get_checked_instance(cls, instance)
    shape = torch.Size(batch_shape)
    for name in d.arg_constraints:
        setattr(new, name, getattr(d, name).expand(shape))
    TorchDistribution.__init__(new, shape, validate_args=False)
    new._validate_args = d._validate_args
    return new


def _ratio(function: Any, w: Tensor, series: tuple[float, ...]) -> Tensor:
    """``function(w)/w`` and its derivative, smooth at 0."""
    near = w.abs() < 1e-2
    safe = torch.where(near, 1.0, w)
    small = torch.where(near, w, 0.0)
    value = torch.zeros_like(w)
    for coefficient in reversed(series):
        value = value * small + coefficient
    return torch.where(near, value, function(safe) / safe)
