"""Stochastic backpropagation: the reparameterised ELBO (Rezende, Mohamed and Wierstra 2014).

Maximises ``E_q[log p(x, h) − log q(h|x)]``, the plain ELBO. Variational autoencoders are a
special case, and with ``estimator="path"`` the gradient is that of NumPyro's ``Trace_ELBO``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax, random
from numpyro.primitives import Messenger

from ..checks import Site, Trace, latents
from ..fisher.arguments import argument_names, arguments
from ..fisher.families import unwrap
from ..graph import Node, record
from ..layout import site_scale
from ..options import check_counts
from ..parameters import parameters
from ..recipe import Recipe
from ..sites import sampled_values, site_log_prob
from ..trace import Params, Programs, Wake
from .base import HelmholtzELBO, Pass, score
from .price import GAUSSIAN, gaussian, of_family, price_terms, root

ESTIMATORS = ("path", "price", "product-rule")
ENTROPIES = (None, "sampled", "closed")
HESSIANS = ("probes", "exact")
LOCATION = (*GAUSSIAN, dist.Laplace, dist.Logistic, dist.Cauchy, dist.StudentT, dist.Gumbel)


class Shifted(Messenger):
    """Let gradients flow through samples, each moved by a shift; enter it outside of a trace.

    Args:
        shifts: by site; a site without one stays where it is. Values that are replayed do, too.
    """

    def __init__(self, shifts: dict[str, Array]) -> None:
        super().__init__()
        self.shifts = shifts
        self.drawn: set[str] = set()

    def process_message(self, msg: Any) -> None:
        """Note which sites are about to be drawn."""
        if msg["type"] == "sample" and msg["value"] is None:
            self.drawn.add(msg["name"])

    def postprocess_message(self, msg: Any) -> None:
        """Move a drawn sample."""
        if msg["type"] == "sample" and msg["name"] in self.drawn and msg["name"] in self.shifts:
            msg["value"] = msg["value"] + self.shifts[msg["name"]]
            msg["intermediates"] = []  # they belong to the value before


@dataclass(eq=False)
class Reparameterised(Programs):
    """The programs with samples that gradients flow through.

    Args:
        shifts: what is added to each of the guide's samples, by site.
    """

    shifts: dict[str, Array] = field(default_factory=dict)

    def sampling(self) -> Shifted:
        """What becomes of samples: they are moved by the shifts."""
        return Shifted(self.shifts)

    def check(self, guide: Trace, model: Trace) -> None:
        """Refuse what cannot be trained, and latents whose samples have no gradient.

        Raises:
            ValueError: naming the site.
        """
        super().check(guide, model)
        check_reparameterised(guide)


class StochasticBackprop_ELBO(HelmholtzELBO):
    """The reparameterised ELBO; three estimators of its gradient in the guide's parameters.

    With f the ELBO as a function of one site's sample ``z = T(ε; φ)``, downstream samples at fixed
    noise and upstream ones constant, the site contributes

    * ``"path"``: ``∇f · ∂T``, the total derivative, for any reparameterisable family;
    * ``"price"``, for Gaussian sites ``z = μ + R ε``: ``∇f · ∂μ + ½ ∇²f : ∂C`` (equations 7 and
      8), as ``½ ∇²f : ∂(RRᵀ) = E_v[(∇²f R v) · ∂R v]`` with v of independent signs. Where a smooth
      f is close to quadratic over the spread of the site, its variance in the covariance is
      below the path's. Other sites keep the path derivative; ``structure`` says which;
    * ``"product-rule"``: ``∇f · ∂μ`` for the location of location families (B = −1 in equation
      30), with constant other arguments.

    Args:
        num_particles: samples per datum; the bound is their mean.
        estimator: "path", "price" or "product-rule".
        entropy: "sampled" (``−log q`` at the samples) or "closed" (the entropy of each site given
            its parents, right for every program). None is "sampled", and for "price" "closed"
            where the site has a closed form.
        hessian: "probes" (products with random signs; the default, as one product serves all
            sites, data and particles at once: its price does not grow with the dimension, and
            for a quadratic f its variance is still below the path's) or "exact" (one product for
            each event dimension of each Gaussian site).
        num_probes: how many probes are averaged.
        max_plate_nesting: see ``HelmholtzELBO``.

    Raises:
        ValueError: an option out of its range.
    """

    can_infer_discrete = False

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
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        _one_of("estimator", estimator, ESTIMATORS)
        _one_of("entropy", entropy, ENTROPIES)
        _one_of("hessian", hessian, HESSIANS)
        check_counts(num_probes=num_probes)
        self.estimator, self.entropy = estimator, entropy
        self.hessian, self.num_probes = hessian, num_probes

    def programs(
        self, model: Callable, guide: Callable, *, constrained: bool = False
    ) -> Reparameterised:
        """The programs with this estimator's options."""
        nesting = self.max_plate_nesting
        return Reparameterised(model, guide, self.num_particles, nesting, None, constrained)

    def bound(self, wake: Wake) -> Array:
        """The ELBO, on the host's scale."""
        return self.elbo(wake) * wake.layout.num_data

    def elbo(self, wake: Wake) -> Array:
        """The ELBO per datum, the mean over particles; differentiable."""
        total = score(wake.model, wake.layout, None)
        for name, site in latents(wake.guide).items():
            total = (
                total + (self._entropy(name, site) * site_scale(site)).sum() / wake.layout.num_data
            )
        return total / wake.num_particles

    def _entropy(self, name: str, site: Site) -> Array:
        """The entropy of a site or its estimate, over its batch."""
        closed = closed_entropy(site["fn"]) if self._wants_closed else None
        if closed is not None:
            return closed
        if self.entropy == "closed":
            raise ValueError(
                f"latent site {name!r} of the guide is {family_name(site['fn'])} with no entropy "
                "in closed form. Use entropy='sampled'."
            )
        return -site_log_prob(site)

    @property
    def _wants_closed(self) -> bool:
        return self.entropy == "closed" or (self.entropy is None and self.estimator == "price")

    def run(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
    ) -> tuple[Array, Pass]:
        """Draw from the guide and differentiate; there is no sleep phase."""
        if self.estimator == "path":
            wake = programs.wake(rng_key, params, args, kwargs, mutable=mutable)
            value = self.elbo(wake)
            return value, self._pass(wake, value, args, kwargs)
        assert isinstance(programs, Reparameterised)
        wake_key, probe_key = random.split(rng_key)
        frozen = lax.stop_gradient(params)
        programs.nesting(wake_key, frozen, args, kwargs, mutable=mutable)  # before any shift

        def run(shifts: dict[str, Array]) -> Wake:
            moved = replace(programs, shifts=shifts)
            return moved.wake(wake_key, frozen, args, kwargs, mutable=mutable)

        def replayed(params: Params) -> Wake:
            samples = lax.stop_gradient(sampled_values(wake.guide))
            return programs.wake(wake_key, params, args, kwargs, samples, mutable=mutable)

        wake = run({})
        if self.estimator == "product-rule":
            check_product_rule(lambda at: replayed(at).guide, frozen)
        at = {name: jnp.zeros_like(s["value"]) for name, s in latents(wake.guide).items()}
        slopes, curved = self._derivatives(lambda at: self.elbo(run(at)), at, wake, probe_key)
        live = replayed(params)
        value = self.elbo(live)
        for name, site in latents(live.guide).items():
            value = value + (slopes[name] * self._moved(site, wake.guide[name])).sum()
            if name in curved:
                probes, products = curved[name]
                value = value + (products * root(gaussian(site["fn"]), probes)).sum()
        return value, self._pass(wake, self.elbo(wake), args, kwargs)

    def describe(self, guide: Trace) -> dict[str, str]:
        """How each latent of the guide is trained, in words, by site."""
        found = {}
        for name, site in latents(guide).items():
            how = self.estimator
            if how == "price":
                how = f"price (Hessian: {self.hessian})"
                if gaussian(site["fn"]) is None:
                    how = f"path ({family_name(site['fn'])} is not one of price's Gaussians)"
            closed = self._wants_closed and closed_entropy(site["fn"]) is not None
            found[name] = f"{how}, entropy: {'closed' if closed else 'sampled'}"
        return found

    def _moved(self, site: Site, drawn: Site) -> Array:
        """What the slope at a site multiplies: its location, or its sample at the same noise."""
        fn = gaussian(site["fn"]) if self.estimator == "price" else location_family(site["fn"])
        if fn is not None:
            return fn.loc
        how = drawn["kwargs"]
        return site["fn"].rsample(how["rng_key"], how.get("sample_shape", ()))

    def _derivatives(
        self, elbo: Callable, at: dict[str, Array], wake: Wake, rng_key: Array
    ) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
        """The gradient in all samples and, for "price", products with the Hessian."""
        if self.estimator == "price":
            options = self.hessian, self.num_probes
            return price_terms(elbo, at, wake.guide, wake.layout, rng_key, *options)
        return jax.grad(elbo)(at), {}

    def _pass(self, wake: Wake, value: Array, args: tuple, kwargs: dict[str, Any]) -> Pass:
        loss = lax.stop_gradient(-value * wake.layout.num_data)
        model, guide = (
            Recipe.of_wake(program, wake, wake.uniform(), args, kwargs)
            for program in ("model", "guide")
        )
        return Pass(loss, model, guide, None, wake.mutable)


def location_family(fn: Any) -> Any | None:
    """The innermost distribution of a location family on the whole line, or None."""
    return of_family(LOCATION, fn)


def family_name(fn: Any) -> str:
    """What a distribution is called without masks, expansions and event dimensions."""
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    return type(fn).__name__


def closed_entropy(fn: Any) -> Array | None:
    """The entropy in closed form over the batch, masked entries zero; None where there is none."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = closed_entropy(fn.base_dist)
        return None if inner is None else jnp.where(fn._mask, inner, 0)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = closed_entropy(fn.base_dist)
        return None if inner is None else jnp.broadcast_to(inner, fn.batch_shape)
    if isinstance(fn, dist.Independent):
        inner = closed_entropy(fn.base_dist)
        axes = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return None if inner is None else inner.sum(axes)
    try:
        return jnp.broadcast_to(fn.entropy(), fn.batch_shape)
    except NotImplementedError:
        return None


def check_reparameterised(guide: Trace) -> None:
    """Refuse latents whose samples have no gradient.

    Raises:
        ValueError: naming the site.
    """
    for name, site in latents(guide).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"latent site {name!r} of the guide is {family_name(site['fn'])}, which has no "
                "reparameterised sampler, so no gradient flows through its draws. RWS, NaturalRWS, "
                "WakeSleep, BiHM and ALWS train discrete and other such latents."
            )


def check_product_rule(run: Callable[[Params], Trace], params: Params) -> None:
    """Refuse sites and arguments that the product rule gives no valid gradient for.

    Integration by parts (equation 30) needs ``B = ∂_θ p / ∂_x p`` to be finite. At the mode of a
    density ``∂_x p`` is 0; only for a location is ``∂_θ p`` 0 there, too.

    Args:
        run: the guide on constant samples at any parameters. params: where.

    Raises:
        ValueError: naming the site, its family and the argument.
    """
    names: list[tuple[str, str, str]] = []

    def trained(at: Params) -> list[Array]:
        found = list(_loose_arguments(run(at)))
        names[:] = [name for name, _ in found]
        return [value for _, value in found]

    values = record(trained, parameters(params), params)
    for (site, family, argument), value in zip(names, values, strict=True):
        if isinstance(value, Node):
            raise ValueError(_refusal(site, family, argument))


def _loose_arguments(guide: Trace) -> Iterator[tuple[tuple[str, str, str], Array]]:
    """Arguments that the product rule cannot train, with site, family and name."""
    for name, site in latents(guide).items():
        family, base = location_family(site["fn"]), unwrap(site["fn"])
        kind = family_name(site["fn"])
        for argument, value in arguments(base.fn, argument_names(base.fn)).items():
            if family is None or argument != "loc":
                yield (name, kind, argument), value
        for leaf in jax.tree.leaves(base.transforms):
            yield (name, kind, "of a transform"), jnp.asarray(leaf)


def _refusal(site: str, family: str, argument: str) -> str:
    known = ", ".join(sorted(cls.__name__ for cls in LOCATION))
    return (
        f"latent site {site!r}: estimator='product-rule' cannot train the argument {argument!r} of "
        f"{family}. Its B(x) = ∂_θ p / ∂_x p has a pole at the mode of the density, where "
        "integration by parts fails; for a Gaussian scale B is -(x-μ-σ)(x-μ+σ)/(2σ²(x-μ)). It "
        f"trains the location of {known} with constant other arguments. Use estimator='path' or "
        "'price'."
    )


def _one_of(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}.")
