"""Dreams as matrices: what the regressions of amortised learning take in.

One run of the model with S particles over M data gives S·M dreams. They are independent draws
from one distribution (given the conditioning variables), so any dream may serve any datum.
Rows are particle-major: (0, 0), (0, 1), ..., (S−1, M−1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.primitives import Messenger

from ..checks import Problem, Site, Trace, check_declared, is_factor, stochastic_sites
from ..exponential_families import ExponentialFamily, exponential_family
from ..fisher.families import unwrap
from ..layout import Layout, same_scale, users_scale
from ..trace import site_log_prob


@dataclass
class Term:
    """One statistic of an observed site, ``η_n · s(x)``.

    Attributes:
        natural: η of the dreams, (N, r), or (1, r) if it is the same for all; with gradient.
        data: s at the data, (M, r). dreams: s at the dreams of given rows, (L, r).
    """

    natural: Array
    data: Array
    dreams: Callable[[Any], Array]


@dataclass
class SleepSet:
    """The dreams, and the data beside them.

    The objective of a datum is ``J(x) = Σ_terms E[η|x]·s(x) − E[Ψ|x] + log h(x)``; all that is
    no exponential family is in −Ψ.

    Attributes:
        inputs: of the regression, one row per dream, (N, d). targets: one per datum, (M, d).
        terms: what is linear in statistics. psi: Ψ of the dreams, (N,), with gradient.
        log_base: log h of the data, (M,). scale: of the data, (M,).
        problems: dreams that are not finite. observed: names of the observed sites.
    """

    inputs: Array
    targets: Array
    terms: list[Term]
    psi: Array
    log_base: Array
    scale: Array
    problems: list[Problem]
    observed: frozenset[str]


class Rows:
    """How the batch dimensions of a layout become rows.

    Args:
        layout: the plates. batch: the batch shape of a site, particles first.
    """

    def __init__(self, layout: Layout, batch: tuple[int, ...]) -> None:
        self.keep = [0, *(layout.ndim + dim for dim in layout.shared)]
        self.rest = [d for d in range(layout.ndim) if d not in self.keep]
        self.batch = tuple(batch)
        self.num_data = math.prod(batch[d] for d in self.keep[1:])

    def flat(self, value: Array, particles: bool = True) -> Array:
        """(*batch, *rest) to (rows, other plates, *rest), broadcast where it must be.

        Args:
            value: of full rank. particles: whether there is a row for every particle.
        """
        first = self.batch[:1] if particles else (1,)
        tail = value.shape[len(self.batch) :]
        return self._as_rows(jnp.broadcast_to(value, (*first, *self.batch[1:], *tail)))

    def compact(self, value: Array, ndim: int) -> Array:
        """As ``flat``, with one row where all batch entries are the same by their shape.

        Args:
            value: with missing or broadcast leading dimensions. ndim: the full rank.
        """
        value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
        if any(value.shape[d] != 1 for d in self.keep):
            return self.flat(value)
        shape = [1 if d in self.keep else n for d, n in enumerate(self.batch)]
        return self._as_rows(jnp.broadcast_to(value, (*shape, *value.shape[len(shape) :])))

    def _as_rows(self, value: Array) -> Array:
        tail = range(len(self.batch), value.ndim)
        value = value.transpose(*self.keep, *self.rest, *tail)
        count = math.prod(value.shape[: len(self.keep)])
        return value.reshape(count, *value.shape[len(self.keep) :])


class Drawable(Messenger):
    """Refuse what the host cannot draw, with the site's name."""

    def process_message(self, msg: Any) -> None:
        """Look at a sample site.

        Raises:
            ValueError: an improper prior, naming the site.
        """
        if msg["type"] == "sample" and isinstance(unwrap(msg["fn"]).fn, dist.ImproperUniform):
            raise ValueError(
                f"site {msg['name']!r} is an ImproperUniform, which cannot be drawn, so the model "
                "cannot dream. Give it a proper prior, or make it a parameter."
            )


def check_dreams(trace: Trace) -> None:
    """Refuse programs that have no dreams to learn from.

    Args:
        trace: of the model on the data.

    Raises:
        ValueError: a factor, a Delta or a mask; naming the site.
    """
    for name, site in stochastic_sites(trace):
        base = unwrap(site["fn"])
        if is_factor(site["fn"]):
            raise ValueError(
                f"site {name!r} is a numpyro.factor: a program with factors cannot dream. Write "
                "it as an observed sample site, or give a prior of the parameters by log_prior."
            )
        if site["is_observed"] and isinstance(base.fn, dist.Delta):
            raise ValueError(
                f"observed site {name!r} is a Delta: dreams of it never come near the data, and "
                "its density has no gradient. Observe a distribution with noise."
            )
        for mask in base.masks:
            unknown = isinstance(mask, jax.core.Tracer)
            if unknown or not bool(np.all(np.asarray(mask))):
                raise ValueError(
                    f"site {name!r} is masked. Amortised learning regresses on whole "
                    "observations and supports no mask: leave the masked data out of the batch, "
                    "or use RWS."
                )


def sleep_set(
    trace: Trace,
    observed: dict[str, Any],
    layout: Layout,
    *,
    families: bool,
    condition: Any = None,
) -> SleepSet:
    """Read a dreamt trace.

    Args:
        trace: of the model, with the observed sites dreamt. observed: their data.
        layout: of the model. families: use exponential families.
        condition: conditioning variables, (data dimensions, c), or None.

    Raises:
        ValueError: a scale that differs between data at one site alone, or a condition of
            another shape; naming the site.
    """
    found: list[Problem] = []
    inputs, targets, terms = [], [], []
    psi: Any = 0.0
    log_base: Any = 0.0
    factors = _relative_scales(trace, layout)
    for name, site in stochastic_sites(trace):
        rows = Rows(layout, site["fn"].batch_shape)
        check_declared(site, rows.batch, layout.ndim, "a batch")
        factor, form = factors[name], None
        if name in observed:
            dream, datum = _values(site, observed[name], rows)
            found += _not_finite(name, dream)
            inputs.append(_encode(site, rows.flat(dream)))
            targets.append(_encode(site, rows.flat(datum, particles=False)))
            form = exponential_family(site["fn"]) if families else None
        if form is None or not _is_fixed(form, rows, site):
            psi = psi - factor * _sum(rows.flat(site_log_prob(site)))
            continue
        new, log_z, log_h = _terms(form, dream, datum, rows, factor)
        terms += new
        psi, log_base = psi + log_z, log_base + log_h
    dtype = psi.dtype
    given = jnp.concatenate([v.astype(dtype) for v in inputs], 1)
    wanted = jnp.concatenate([v.astype(dtype) for v in targets], 1)
    if condition is not None:
        condition = _check_condition(condition, rows).astype(dtype)
        wanted = jnp.concatenate([wanted, condition], 1)
        times = len(given) // len(condition)
        given = jnp.concatenate([given, jnp.tile(condition, (times, 1))], 1)
    base = jnp.broadcast_to(jnp.asarray(log_base, dtype), (rows.num_data,))
    scale = _data_scale(layout, rows).astype(dtype)
    return SleepSet(given, wanted, terms, psi, base, scale, found, frozenset(observed))


def log_joint(trace: Trace, layout: Layout) -> tuple[Array, Array]:
    """``log p(z, x)`` per row, (particles · M,), without the data's scale, and that scale (M,)."""
    total: Any = 0.0
    factors = _relative_scales(trace, layout)
    for name, site in stochastic_sites(trace):
        total = total + factors[name] * layout.reduce(site_log_prob(site))
    scale = _data_scale(layout, Rows(layout, total.shape)).astype(total.dtype)
    return total.reshape(-1), scale


def _values(site: Site, data: Any, rows: Rows) -> tuple[Array, Array]:
    """The dreams (*batch, *event) and the data, with a particle dimension of size 1."""
    dream = lax.stop_gradient(site["value"])
    shape = (1, *rows.batch[1:], *dream.shape[len(rows.batch) :])
    return dream, jnp.broadcast_to(jnp.asarray(data).astype(dream.dtype), shape)


def _not_finite(name: str, dream: Array) -> list[Problem]:
    if not jnp.issubdtype(dream.dtype, jnp.floating):
        return []
    message = f"observed site {name!r}: the model dreams {{count}} values that are not finite."
    return [Problem(jnp.sum(~jnp.isfinite(dream)), message)]


def _terms(
    form: ExponentialFamily, dream: Array, datum: Array, rows: Rows, factor: Any
) -> tuple[list[Term], Array, Array]:
    """The terms of a site, its ``log Z`` (N,) and its ``log h`` (M,)."""
    flat = rows.flat(dream)
    found = []
    for i, (eta, s) in enumerate(zip(form.natural, form.statistics(datum), strict=True)):
        natural = rows.compact(eta, s.ndim)
        data = rows.flat(s, particles=False)
        # A parameter that all entries of the event share, such as a scalar noise, has 1 there.
        natural = jnp.broadcast_to(natural, (len(natural), *data.shape[1:]))

        def at_dreams(which: Any, i: int = i) -> Array:
            return form.statistics(flat[which])[i].reshape(len(which), -1)

        found.append(Term(factor * _flatten(natural), _flatten(data), at_dreams))
    log_h = form.log_base(datum)
    log_z = jnp.broadcast_to(form.log_normaliser, rows.batch + log_h.shape[len(rows.batch) :])
    return found, factor * _sum(rows.flat(log_z)), factor * _sum(rows.flat(log_h, particles=False))


def _is_fixed(form: ExponentialFamily, rows: Rows, site: Site) -> bool:
    """Whether what enters the base measure is free of parameters and the same for all dreams.

    Floating-point numbers may be parameters, so only integers count as fixed.
    """
    fn = site["fn"]
    ndim = len(fn.shape()) - len(unwrap(fn).fn.event_shape)
    for value in form.fixed:
        shape = (1,) * (ndim - jnp.ndim(value)) + jnp.shape(value)
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            return False
        if any(shape[d] != 1 for d in rows.keep):
            return False
    return True


def _encode(site: Site, values: Array) -> Array:
    """Values as real vectors, (rows, d); categories become one-hot."""
    base = unwrap(site["fn"]).fn
    if isinstance(base, dist.CategoricalLogits | dist.CategoricalProbs):
        probs = base.logits if isinstance(base, dist.CategoricalLogits) else base.probs
        values = jax.nn.one_hot(values, probs.shape[-1])
    return _flatten(values)


def _flatten(values: Array) -> Array:
    return values.reshape(len(values), -1)


def _sum(values: Array) -> Array:
    return _flatten(values).sum(1)


def _relative_scales(trace: Trace, layout: Layout) -> dict[str, Any]:
    """Each site's scale over the one that all sites share, by name."""
    sites = dict(stochastic_sites(trace))
    users = {name: users_scale(site) for name, site in sites.items()}
    first = next(iter(users.values()))
    shared = all(same_scale(first, other) for other in users.values())
    found = {}
    for name, site in sites.items():
        plates = [
            f for f in site["cond_indep_stack"] if f.name in trace and f.dim not in layout.shared
        ]
        inner = math.prod(trace[f.name]["args"][0] / f.size for f in plates)
        if not shared and jnp.size(users[name]) != 1:
            raise ValueError(
                f"site {name!r} has a scale of shape {jnp.shape(users[name])} that differs from "
                "the other sites'. Give all sites the same scale of the data, or this one a "
                "number."
            )
        found[name] = inner if shared else inner * jnp.reshape(jnp.asarray(users[name]), ())
    return found


def _data_scale(layout: Layout, rows: Rows) -> Array:
    scale = jnp.asarray(layout.common_scale)
    full = scale.reshape((1,) * (layout.ndim - scale.ndim) + scale.shape)
    if any(full.shape[d] != 1 for d in [0, *rows.rest]):
        raise ValueError(
            f"the sites' scale of shape {scale.shape} differs along a plate that does not "
            "separate the data. Scale whole data only."
        )
    shape = [n if d in rows.keep[1:] else 1 for d, n in enumerate(rows.batch)]
    return jnp.broadcast_to(full, shape).reshape(-1)


def _check_condition(condition: Any, rows: Rows) -> Array:
    condition = lax.stop_gradient(jnp.asarray(condition))
    if condition.size == 0 or condition.size % rows.num_data:
        raise ValueError(
            f"condition must return one row for each of the {rows.num_data} data, got shape "
            f"{condition.shape}."
        )
    return condition.reshape(rows.num_data, -1)
