"""The bidirectional machine's normalisation constant, and with it its log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from .evaluation import LogLikelihood, check_width, in_batches, log_likelihood
from .messengers import Dreaming, record
from .options import check_counts
from .sites import only_subsamples, stochastic_sites
from .trace import Programs, Wake

__all__ = ["LogPartition", "bidirectional_log_likelihood", "log_partition"]


@dataclass(frozen=True, eq=False)
class LogPartition:
    """Estimates of ``log Z² = log Σ_x p̃*(x)``, one per datum and one from all of them.

    Data without inputs of their own all have the same Z: take ``value``. Where the programs
    condition on something that differs from datum to datum (labels, a context), each has its
    own: take ``values``.

    Attributes:
        sums: logsumexp over the dreams of ``log r`` and of ``2 log r``, shape (2, n_data),
            float64; Z² is the mean of r.
        num_dreams: dreams of each datum.
    """

    sums: Tensor
    num_dreams: int

    @property
    def values(self) -> Tensor:
        """``log Z²`` of each datum, shape ``(n_data,)``."""
        return self.sums[0] - math.log(self.num_dreams)

    @property
    def stderrs(self) -> Tensor:
        """Standard error of each of ``values`` (NaN for a single dream)."""
        return _relative_error(self.sums, self.num_dreams)

    @property
    def value(self) -> float:
        """``log Z²`` from the dreams of all data together."""
        return float(self.sums.logsumexp(1)[0]) - math.log(self._count)

    @property
    def stderr(self) -> float:
        """Standard error of ``value``: that of the mean of r, divided by it."""
        return float(_relative_error(self.sums.logsumexp(1), self._count))

    @property
    def _count(self) -> int:
        return self.num_dreams * self.sums.shape[1]

    def __repr__(self) -> str:
        return (
            f"LogPartition(value={self.value:.4f}, stderr={self.stderr:.4f}, "
            f"n_data={self.sums.shape[1]}, num_dreams={self.num_dreams})"
        )


def log_partition(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_dreams: int = 100,
    num_particles: int = 10,
    batch: int | None = None,
    dream_args: Callable | None = None,
    max_plate_nesting: float = math.inf,
    progress: bool = False,
    **kwargs: Any,
) -> LogPartition:
    """Estimates ``log Z²``, which normalises ``p*(x) = p̃*(x) / Z²`` (Bornschein et al. 2016).

    ``Z² = Σ_x (Σ_h √(p(x,h) q(h|x)))² = E[r]`` with ``(x, h) ~ p``, ``h_s ~ q(h|x)`` and::

        r = √(q(h|x) / p(x,h)) · 1/K Σ_s √(p(x,h_s) / q(h_s|x))

    The mean of r has no bias, for any K; ``Z² ≤ 1``. Only running sums are kept. The data matter
    through their number and through inputs that the programs condition on; their own values are
    replaced by dreams.

    Args:
        model: the generative program, called as ``model(*args, **kwargs)``.
        guide: the recognition program, called with the same arguments.
        *args: arguments of both programs; every datum of them dreams.
        num_dreams: dreams of each datum.
        num_particles: the number K of the guide's particles for each dream.
        batch: the number of data that dream together; all by default, see ``log_likelihood``.
        dream_args: ``fn(dreams, *args, **kwargs) -> (args, kwargs)`` for the guide.
        max_plate_nesting: the plates nested in the programs; found by a run if infinite.
        progress: whether to show a progress bar.
        **kwargs: keyword arguments of both programs.

    Returns:
        ``value`` and its ``stderr`` from all dreams, ``values`` and ``stderrs`` for each datum.

    Raises:
        ValueError: a count that is no int of at least 1, no data, a model that cannot dream, a
            masked site, or ``batch`` where the data do not separate.
    """
    check_counts(num_dreams=num_dreams, num_particles=num_particles)
    starts, take = in_batches(args, kwargs, batch)
    programs = Programs(model, guide, num_particles, max_plate_nesting, dream_args)
    found = []
    with (
        torch.no_grad(),
        tqdm(total=len(starts) * num_dreams, unit="dream", disable=not progress) as bar,
    ):
        for start in starts:
            width, (args, kwargs) = take(start)
            programs.wake(args, kwargs)  # what is wrong with programs or data shows here
            sums = torch.tensor(-math.inf, dtype=torch.float64)
            for _ in range(num_dreams):
                log_r = _log_ratio(programs, args, kwargs).cpu().double()
                check_width(width, len(log_r))
                _check_ratio(log_r < math.inf)
                sums = torch.logaddexp(sums, torch.stack([log_r, 2 * log_r]))
                bar.update()
            found.append(sums)
    return LogPartition(torch.cat(found, 1), num_dreams)


def bidirectional_log_likelihood(
    model: Callable,
    guide: Callable,
    *args: Any,
    partition: LogPartition | None = None,
    **options: Any,
) -> LogLikelihood:
    """Importance-sampling estimates of ``log p*(x) = log p̃*(x) − log Z²``, one per datum.

    Args:
        model, guide, *args, **options: see ``log_likelihood``.
        partition: of the same programs and parameters; without it the values are those of the
            unnormalised ``log p̃*(x)``, a lower bound of ``log p*(x)`` and of ``log p(x)``.

    Returns:
        As ``log_likelihood``, with the effective sample size of ``√w``. The standard error is
        that over the data alone: add ``partition.stderr`` to it in squares.

    Raises:
        ValueError: see ``log_likelihood``.
    """
    result = log_likelihood(model, guide, *args, power=0.5, **options)
    return result if partition is None else replace(result, values=result.values - partition.value)


def _log_ratio(programs: Programs, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """``log r`` of one dream of each datum, shape (n_data,)."""
    dream = programs.dream(args, kwargs)
    _refuse_masks(dream.model)
    _refuse_masks(dream.guide)
    held = only_subsamples(dream.model)
    with programs.particles(dream.layout.ndim - 1):
        guide = record(programs.guide, dream.args, dream.kwargs, held)
        samples = _samples(dream.model, guide)
        model = record(Dreaming()(programs.model), args, kwargs, samples)
    at_dream = Wake(dream.model, dream.guide, dream.layout, 1).log_weights[0]
    particles = Wake(model, guide, dream.layout, programs.num_particles).log_weights
    return (particles / 2).logsumexp(0) - math.log(len(particles)) - at_dream / 2


def _samples(*traces: poutine.Trace) -> poutine.Trace:
    """The sampled sites of all traces; later ones win."""
    samples = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                samples.nodes.pop(name, None)
                samples.add_node(name, **site)
    return samples


def _refuse_masks(trace: poutine.Trace) -> None:
    """The sum over x runs over whole data: a masked part has no place in it."""
    for name, site in stochastic_sites(trace):
        masks, fn = [site["mask"]], site["fn"]
        while hasattr(fn, "base_dist"):
            masks.append(getattr(fn, "_mask", None))
            fn = fn.base_dist
        if any(mask is not None and mask is not True for mask in masks):
            raise ValueError(
                f"site {name!r} is masked: log_partition sums over whole data, of which no part "
                "can be left out. Call it with programs and data without masks."
            )


def _check_ratio(fine: Tensor) -> None:
    if not bool(fine.all()):
        raise ValueError(
            f"the ratio of guide and model at {int((~fine).sum())} of {len(fine)} dreams is not a "
            "number: look for overflowing parameters"
        )


def _relative_error(sums: Tensor, count: int) -> Tensor:
    """Of the mean of r: ``√(var r / count) / mean r``, from logsumexp of log r and 2 log r."""
    if count < 2:
        return torch.full_like(sums[0], math.nan)
    ratio = count * (sums[1] - 2 * sums[0]).exp() - 1
    return (ratio.clamp(min=0) / (count - 1)).sqrt()
