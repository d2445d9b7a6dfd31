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

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_log_prob_shape, check_observations
from ..exponential_families import ExponentialFamily, exponential_family
from ..fisher.families import unwrap
from ..layout import Layout, Site
from ..sites import site_log_prob, stochastic_sites


@dataclass
class Term:
    """One statistic of an observed site, ``η_n · s(x)``.

    Attributes:
        natural: η of the dreams, (N, r), or (1, r) if it is the same for all; with graph.
        data: s at the data, (M, r). dreams: s at the dreams of given rows, (L, r).
    """

    natural: Tensor
    data: Tensor
    dreams: Callable[[Tensor], Tensor]


@dataclass
class SleepSet:
    """The dreams of one turn of the sequential plates, and the data beside them.

    The objective of a datum is ``J(x) = Σ_terms E[η|x]·s(x) − E[Ψ|x] + log h(x)``; all that is
    no exponential family is in −Ψ.

    Attributes:
        inputs: of the regression, one row per dream, (N, d). targets: one per datum, (M, d).
        terms: what is linear in statistics. psi: Ψ of the dreams, (N,), with graph.
        log_base: log h of the data, (M,). scale: of the data, (M,).
    """

    inputs: Tensor
    targets: Tensor
    terms: list[Term]
    psi: Tensor
    log_base: Tensor
    scale: Tensor


class Rows:
    """How the batch dimensions of a layout become rows.

    Args:
        layout: the plates. batch: the batch shape of a site, particles first.
    """

    def __init__(self, layout: Layout, batch: torch.Size) -> None:
        self.keep = [0, *(layout.ndim + dim for dim in layout.shared)]
        self.rest = [d for d in range(layout.ndim) if d not in self.keep]
        self.batch = batch
        self.num_data = math.prod(batch[d] for d in self.keep[1:])

    def flat(self, value: Tensor, particles: bool = True) -> Tensor:
        """(*batch, *rest) to (rows, other plates, *rest), broadcast where it must be.

        Args:
            value: of full rank. particles: whether there is a row for every particle.
        """
        first = self.batch[:1] if particles else torch.Size([1])
        ndim = len(self.batch)
        value = value.expand(first + self.batch[1:] + value.shape[ndim:])
        return self._as_rows(value)

    def compact(self, value: Tensor, ndim: int) -> Tensor:
        """As ``flat``, with one row where all batch entries are the same by their shape.

        Args:
            value: with missing or broadcast leading dimensions. ndim: the full rank.
        """
        value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
        if any(value.shape[d] != 1 for d in self.keep):
            return self.flat(value)
        shape = [1 if d in self.keep else n for d, n in enumerate(self.batch)]
        return self._as_rows(value.expand(shape + list(value.shape[len(shape) :])))

    def _as_rows(self, value: Tensor) -> Tensor:
        tail = range(len(self.batch), value.ndim)
        value = value.permute(*self.keep, *self.rest, *tail)
        count = math.prod(value.shape[: len(self.keep)])
        return value.reshape(count, *value.shape[len(self.keep) :])


def check_dreams(trace: poutine.Trace, observed: dict[str, Any]) -> None:
    """Refuse data and programs that have no dreams to learn from.

    Raises:
        ValueError: no observed site, empty or NaN data, a Delta, a mask; naming the site.
    """
    data = poutine.Trace()
    for name, value in observed.items():
        data.add_node(name, **{**trace.nodes[name], "value": value, "is_observed": True})
    check_observations(data)
    for name, site in stochastic_sites(trace):
        base = unwrap(site["fn"])
        if name in observed and type(base.fn).__name__ == "Delta":
            raise ValueError(
                f"observed site {name!r} is a Delta: dreams of it never come near the data, and "
                "its density has no gradient. Observe a distribution with noise."
            )
        for mask in [site["mask"], *base.masks]:
            if mask is not None and not bool(torch.as_tensor(mask).all()):
                raise ValueError(
                    f"site {name!r} is masked. Amortised learning regresses on whole "
                    "observations and supports no mask: leave the masked data out of the batch, "
                    "or use RWS."
                )


def sleep_set(
    trace: poutine.Trace,
    observed: dict[str, Any],
    layout: Layout,
    key: tuple,
    *,
    families: bool,
    condition: Tensor | None,
) -> SleepSet:
    """Read one turn of a dreamt trace.

    Args:
        trace: of the model, with the observed sites dreamt. observed: their data.
        layout: of the model. key: the turn. families: use exponential families.
        condition: conditioning variables, (M, c), or None.

    Raises:
        ValueError: dreams that are not finite, or a scale that differs between data at one
            site alone; naming the site.
    """
    inputs, targets, terms = [], [], []
    psi: Any = 0.0
    log_base: Any = 0.0
    rows: Rows | None = None
    for name, site in stochastic_sites(trace):
        if layout.key(site) != key:
            continue
        rows = Rows(layout, site["fn"].batch_shape)
        check_log_prob_shape(site, torch.zeros(()).expand(rows.batch), layout.ndim)
        factor = _relative_scale(site, layout)
        form = None
        if name in observed:
            dream, datum = _values(site, observed[name], rows)
            inputs.append(_encode(site, rows.flat(dream)))
            targets.append(_encode(site, rows.flat(datum, particles=False)))
            form = exponential_family(site["fn"]) if families else None
        if form is None or not _is_fixed(form):
            psi = psi - factor * _sum(rows.flat(site_log_prob(site)))
            continue
        terms += _terms(form, dream, datum, rows, factor)
        psi = psi + factor * _sum(rows.flat(form.log_normaliser))
        log_base = log_base + factor * _sum(rows.flat(form.log_base(datum)[:1], particles=False))
    assert rows is not None
    first = psi.detach()
    given = torch.cat([v.to(first) for v in inputs], 1)
    wanted = torch.cat([v.to(first) for v in targets], 1)
    if condition is not None:
        condition = _check_condition(condition, rows).to(first)
        wanted = torch.cat([wanted, condition], 1)
        given = torch.cat([given, condition.repeat(len(given) // len(condition), 1)], 1)
    scale = _data_scale(layout, rows).to(first)
    base = torch.as_tensor(log_base).to(first).expand(rows.num_data)
    return SleepSet(given, wanted, terms, psi, base, scale)


def log_joint(trace: poutine.Trace, layout: Layout) -> tuple[Tensor, Tensor]:
    """``log p(z, x)`` per row, (particles · M,), without the data's scale, and that scale (M,)."""
    total: Any = 0.0
    for _, site in stochastic_sites(trace):
        total = total + _relative_scale(site, layout) * layout.reduce(site_log_prob(site))
    scale = _data_scale(layout, Rows(layout, total.shape)).to(total)
    return total.reshape(-1), scale


def _values(site: Site, data: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """The dreams (*batch, *event) and the data, with a particle dimension of size 1."""
    dream = site["value"]
    if not bool(torch.isfinite(dream).all()):
        raise ValueError(
            f"observed site {site['name']!r}: the model dreams values that are not finite."
        )
    shape = (1, *rows.batch[1:], *dream.shape[len(rows.batch) :])
    return dream, torch.as_tensor(data).to(dream).expand(shape)


def _terms(
    form: ExponentialFamily, dream: Tensor, datum: Tensor, rows: Rows, factor: float
) -> list[Term]:
    flat = rows.flat(dream)
    found = []
    for i, (eta, s) in enumerate(zip(form.natural, form.statistics(datum), strict=True)):
        natural = rows.compact(eta, s.ndim)
        data = rows.flat(s, particles=False)

        def at_dreams(which: Tensor, i: int = i) -> Tensor:
            return _matrix(form.statistics(flat[which])[i])

        scaled = factor * natural if factor != 1 else natural
        found.append(Term(_matrix(scaled), _matrix(data), at_dreams))
    return found


def _is_fixed(form: ExponentialFamily) -> bool:
    """Whether the base measure is free of the parameters and the same for all dreams."""
    return all(
        not v.requires_grad and bool((v == v[:1] if v.ndim else v == v).all()) for v in form.fixed
    )


def _encode(site: Site, values: Tensor) -> Tensor:
    """Values as real vectors, (rows, d); categories become one-hot."""
    base = unwrap(site["fn"]).fn
    if isinstance(base, torch.distributions.Categorical):
        size = base.logits.shape[-1]
        values = torch.nn.functional.one_hot(values.long(), size)
    return _matrix(values)


def _matrix(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _sum(values: Tensor) -> Tensor:
    return _matrix(values).sum(1)


def _relative_scale(site: Site, layout: Layout) -> float:
    """The site's scale over the one that all sites share."""
    scale, common = site["scale"], layout.common_scale
    if scale is common:
        return 1.0
    ratio = torch.as_tensor(scale / common)
    if bool((ratio != ratio.reshape(-1)[0]).any()):
        raise ValueError(
            f"site {site['name']!r} has a scale of shape {tuple(ratio.shape)} that differs between "
            "data and from the other sites'. Give all sites the same scale of the data, or this "
            "one a number."
        )
    return float(ratio.reshape(-1)[0])


def _data_scale(layout: Layout, rows: Rows) -> Tensor:
    scale = torch.as_tensor(layout.common_scale)
    full = scale.reshape((1,) * (layout.ndim - scale.ndim) + scale.shape)
    if any(full.shape[d] != 1 for d in [0, *rows.rest]):
        raise ValueError(
            f"the sites' scale of shape {tuple(scale.shape)} differs along a plate that does not "
            "separate the data. Scale whole data only."
        )
    shape = [n if d in rows.keep[1:] else 1 for d, n in enumerate(rows.batch)]
    return full.expand(shape).reshape(-1)


def _check_condition(condition: Any, rows: Rows) -> Tensor:
    condition = torch.as_tensor(condition).detach()
    if condition.numel() == 0 or condition.numel() % rows.num_data:
        raise ValueError(
            f"condition must return one row for each of the {rows.num_data} data, got shape "
            f"{tuple(condition.shape)}."
        )
    return condition.reshape(rows.num_data, -1)
