"""Stochastic backpropagation: the reparameterised ELBO (Rezende, Mohamed and Wierstra 2014).

Maximises the plain ELBO ``E_q[log p(x, h) − log q(h|x)]``. Variational autoencoders are a
special case, and with ``estimator="path"`` the gradient is that of Pyro's ``Trace_ELBO``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from ..checks import latents
from ..fisher.arguments import argument_names
from ..fisher.families import unwrap
from ..layout import Site
from ..options import check_counts
from ..sites import site_log_prob, stochastic_sites
from ..trace import Programs, Wake
from .base import HelmholtzELBO, Pass
from .price import Gates, gaussian, price_terms, warn_of_kinks

__all__ = ["StochasticBackprop_ELBO"]

ESTIMATORS = ("path", "price", "product-rule")
ENTROPIES = (None, "sampled", "closed")
HESSIANS = ("probes", "exact")
WRAPPERS = (
    torch.distributions.Independent,
    dist.torch_distribution.ExpandedDistribution,
    dist.torch_distribution.MaskedDistribution,
)
LOCATION_FAMILIES = (
    "Normal",
    "MultivariateNormal",
    "RankOnePrecisionNormal",
    "Laplace",
    "Logistic",
    "Cauchy",
    "StudentT",
    "Gumbel",
)


class StochasticBackprop_ELBO(HelmholtzELBO):
    """The ELBO of reparameterised latents; the loss is minus its mean over the particles.

    Estimators of the gradient with respect to what the latents are drawn from:

    * "path": the derivative through the draws ``z = T(φ, ε)`` (equation 10), for every
      distribution with a reparameterised sampler.
    * "price": for Normal, MultivariateNormal and RankOnePrecisionNormal sites the gradient of
      the location by ``E ∇f`` and that of the covariance by ``½ E ∇²f`` (equations 7 and 8); the
      other sites keep the path. Less variance in the scales, one more pass of derivatives.
      The model must be twice differentiable in the latents. ``hessian="probes"`` takes products
      of the Hessian with ``num_probes`` Rademacher vectors: unbiased, and one product serves all
      sites, particles and data, so that its cost does not grow with the latent dimension,
      which is why it is the default. "exact" takes one product for each dimension.
    * "product-rule": integration by parts (equation 30), ``∇_θ E f = −E ∇_x(B f)``. It holds for
      the locations of location families on the whole line, where ``B = −1``. For any other
      argument B has a pole at the mode, where ``∂_x p = 0`` but ``∂_θ p ≠ 0``, or leaves a term
      at the edge of the support: an error. (The form of equation 31 is solved by
      ``B = ∂_θ cdf / p`` and is the path derivative itself.)

    Args:
        num_particles: K.
        estimator: see above.
        entropy: "sampled" takes ``−log q`` at the draw, as ``Trace_ELBO`` does; "closed" the
            entropy of every guide site given its parents, in closed form. None is "sampled", and
            for "price" closed where the site has a closed form. The sampled form has no variance
            in the loss once q is the exact posterior; the closed form still has some.
        hessian: "probes" or "exact". num_probes: at least 1.
        max_plate_nesting: see ``HelmholtzELBO``.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        estimator: str = "path",
        entropy: str | None = None,
        hessian: str = "probes",
        num_probes: int = 1,
        max_plate_nesting: float = math.inf,
    ) -> None:
        for name, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("entropy", entropy, ENTROPIES),
            ("hessian", hessian, HESSIANS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}.")
        check_counts(num_probes=num_probes)
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.estimator, self.entropy = estimator, entropy
        self.hessian, self.num_probes = hessian, num_probes
        self._looked_for_kinks = False

    def run(self, programs: Programs, args: tuple, kwargs: dict[str, Any]) -> Pass:
        """Run both programs once, with gradients through the draws."""
        gates = Gates() if self.estimator == "price" else None
        wake = programs.wake(args, kwargs, sampling=gates or nullcontext())
        objective = self.bound(wake)
        surrogate = objective
        if gates is not None:
            if objective.requires_grad and not self._looked_for_kinks:
                warn_of_kinks(objective, gates.after)
                self._looked_for_kinks = True
            surrogate = objective + price_terms(
                objective,
                latents(wake.guide),
                gates,
                wake.layout,
                hessian=self.hessian,
                num_probes=self.num_probes,
            )
            gates.shut()
        return Pass(-objective.detach(), surrogate / wake.layout.num_data, wake, None)

    def bound(self, wake: Wake) -> Tensor:
        """The ELBO on the host's scale, ``1/K Σ_s Σ_sites scale (log p − log q)``."""
        guide = latents(wake.guide)
        check_reparameterised(guide)
        if self.estimator == "product-rule":
            check_product_rule(guide)
        total: Any = 0.0
        for _, site in stochastic_sites(wake.model):
            total = total + _scaled(site_log_prob(site), site)
        for site in guide.values():
            closed = self._entropy(site)
            term = -site_log_prob(site) if closed is None else closed
            total = total + _scaled(term, site)
        return total / wake.num_particles

    def _entropy(self, site: Site) -> Tensor | None:
        """The site's entropy in closed form where it is wanted, masked entries zero."""
        if self.entropy == "sampled" or (self.entropy is None and self.estimator != "price"):
            return None
        try:
            return scale_and_mask(closed_entropy(site["fn"]), 1.0, site["mask"])
        except NotImplementedError as error:
            if self.entropy is None:
                return None
            raise ValueError(
                f"latent site {site['name']!r}: {family_name(site['fn'])} as it "
                "stands in the guide has no entropy in closed form. Use entropy='sampled'."
            ) from error

    def describe(self, wake: Wake) -> dict[str, str]:
        """For each latent, how its gradient and its entropy are found."""
        found = {}
        for name, site in latents(wake.guide).items():
            how = self.estimator
            if how == "price":
                how = f"price (Hessian: {self.hessian})"
                if gaussian(site["fn"]) is None:
                    how = f"path ({family_name(site['fn'])} is not one of price's Gaussians)"
            entropy = "sampled" if self._entropy(site) is None else "closed"
            found[name] = f"{how}, entropy: {entropy}"
        return found


def _scaled(log_prob: Tensor, site: Site) -> Tensor:
    scale = site["scale"]
    if torch.is_tensor(scale) or scale != 1.0:
        log_prob = log_prob * scale
    return log_prob.sum()


def family_name(fn: Any) -> str:
    """What a distribution is called without masks, expansions and event dimensions."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return type(fn).__name__


def closed_entropy(fn: Any) -> Tensor:
    """The entropy in closed form, batch shape; also of wrapped distributions.

    Raises:
        NotImplementedError: there is none.
    """
    if isinstance(fn, dist.torch_distribution.MaskedDistribution):
        return scale_and_mask(closed_entropy(fn.base_dist), 1.0, fn._mask)
    if isinstance(fn, dist.torch_distribution.ExpandedDistribution):
        return closed_entropy(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, torch.distributions.Independent):
        return sum_rightmost(closed_entropy(fn.base_dist), fn.reinterpreted_batch_ndims)
    return fn.entropy()


def check_reparameterised(sites: dict[str, Site]) -> None:
    """Refuse latents through whose draws no gradient flows.

    Raises:
        ValueError: naming the site.
    """
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"latent site {name!r} of the guide is {family_name(site['fn'])}, "
                "which has no reparameterised sampler, so no gradient flows through its draws. "
                "RWS, NaturalRWS, WakeSleep, BiHM and ALWS train discrete and other such latents."
            )


def check_product_rule(sites: dict[str, Site]) -> None:
    """Refuse what integration by parts does not hold for.

    Raises:
        ValueError: naming the site and the argument.
    """
    for name, site in sites.items():
        base = unwrap(site["fn"])
        family = family_name(site["fn"])
        if family not in LOCATION_FAMILIES:
            raise ValueError(
                f"latent site {name!r} of the guide: the product rule does not hold for "
                f"{family}. It needs a location family on the whole line, one of "
                f"{LOCATION_FAMILIES}; elsewhere B(x) has a pole at the mode or leaves a term at "
                "the edge of the support. Use estimator='path'."
            )
        for argument in argument_names(base.fn):
            if argument != "loc" and getattr(base.fn, argument).requires_grad:
                raise ValueError(
                    f"latent site {name!r} of the guide trains {argument!r} of {family}, for which "
                    "the product rule does not hold: B(x) = ∂_θ p / ∂_x p has a pole at the mode, "
                    "where ∂_x p = 0 but ∂_θ p ≠ 0. Only 'loc' may be trained. Use "
                    "estimator='path' or 'price'."
                )
