"""The bidirectional machine's normalisation constant, and with it its log-likelihood."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array, random
from jax.scipy.special import logsumexp
from tqdm.auto import tqdm

from .arguments import Arguments
from .checks import Trace, stochastic_sites
from .evaluation import (
    LogLikelihood,
    check_width,
    hashable,
    in_batches,
    log_likelihood,
    looked_at,
)
from .messengers import Dreaming
from .options import check_counts
from .trace import Params, Programs, Wake, sampled_values, subsample_values

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

    sums: np.ndarray
    num_dreams: int

    @property
    def values(self) -> np.ndarray:
        """``log Z²`` of each datum, shape ``(n_data,)``."""
        return self.sums[0] - math.log(self.num_dreams)

    @property
    def stderrs(self) -> np.ndarray:
        """Standard error of each of ``values`` (NaN for a single dream)."""
        return _relative_error(self.sums, self.num_dreams)

    @property
    def value(self) -> float:
        """``log Z²`` from the dreams of all data together."""
        return float(np.logaddexp.reduce(self.sums, 1)[0]) - math.log(self._count)

    @property
    def stderr(self) -> float:
        """Standard error of ``value``: that of the mean of r, divided by it."""
        return float(_relative_error(np.logaddexp.reduce(self.sums, 1), self._count))

    @property
    def _count(self) -> int:
        return self.num_dreams * self.sums.shape[1]

    def __repr__(self) -> str:
        return (
            f"LogPartition(value={self.value:.4f}, stderr={self.stderr:.4f}, "
            f"n_data={self.sums.shape[1]}, num_dreams={self.num_dreams})"
        )


def log_partition(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    *args: Any,
    num_dreams: int = 100,
    num_particles: int = 10,
    batch: int | None = None,
    mutable_state: Params | None = None,
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
        rng_key: random key.
        params: the parameters as ``get_params`` gives them.
        model: the generative program, called as ``model(*args, **kwargs)``.
        guide: the recognition program, called with the same arguments.
        *args: arguments of both programs; every datum of them dreams.
        num_dreams: dreams of each datum.
        num_particles: the number K of the guide's particles for each dream.
        batch: the number of data that dream together; all by default, see ``log_likelihood``.
        mutable_state: state of mutable sites, as the optimisation's state holds it.
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
    mutable = mutable_state or {}
    model, guide = hashable(model), hashable(guide)
    nesting = looked_at(rng_key, params, model, guide, args, kwargs, mutable, max_plate_nesting)
    draw = _drawer(model, guide, num_particles, nesting, dream_args)
    found = []
    with tqdm(total=len(starts) * num_dreams, unit="dream", disable=not progress) as bar:
        for start in starts:
            width, these = take(start)
            arguments = Arguments.of(these)
            sums = np.array(-math.inf)
            for _ in range(num_dreams):
                rng_key, key = random.split(rng_key)
                log_r = np.asarray(draw(key, params, mutable, arguments), np.float64)
                check_width(width, len(log_r))
                _check_ratio(log_r < math.inf)
                sums = np.logaddexp(sums, np.stack([log_r, 2 * log_r]))
                bar.update()
            found.append(sums)
    return LogPartition(np.concatenate(found, 1), num_dreams)


def bidirectional_log_likelihood(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    *args: Any,
    partition: LogPartition | None = None,
    **options: Any,
) -> LogLikelihood:
    """Importance-sampling estimates of ``log p*(x) = log p̃*(x) − log Z²``, one per datum.

    Args:
        rng_key, params, model, guide, *args, **options: see ``log_likelihood``.
        partition: of the same programs and parameters; without it the values are those of the
            unnormalised ``log p̃*(x)``, a lower bound of ``log p*(x)`` and of ``log p(x)``.

    Returns:
        As ``log_likelihood``, with the effective sample size of ``√w``. The standard error is
        that over the data alone: add ``partition.stderr`` to it in squares.

    Raises:
        ValueError: see ``log_likelihood``.
    """
    result = log_likelihood(rng_key, params, model, guide, *args, power=0.5, **options)
    return result if partition is None else replace(result, values=result.values - partition.value)


@functools.lru_cache(maxsize=32)
def _drawer(
    model: Callable, guide: Callable, num_particles: int, nesting: int, dream_args: Callable | None
) -> Callable:
    """A compiled pass: ``(key, params, mutable, arguments) -> log r``, (n_data,)."""
    programs = Programs(model, guide, num_particles, nesting, dream_args, constrained=True)

    def draw(rng_key: Array, params: Params, mutable: Params, arguments: Arguments) -> Array:
        return _log_ratio(programs, rng_key, params, mutable, *arguments.rebuilt())

    return jax.jit(draw)


def _log_ratio(
    programs: Programs,
    rng_key: Array,
    params: Params,
    mutable: Params,
    args: tuple,
    kwargs: dict[str, Any],
) -> Array:
    """``log r`` of one dream of each datum, shape (n_data,)."""
    keys = random.split(rng_key, 3)
    dream = programs.dream(keys[0], params, args, kwargs, mutable=mutable)
    _refuse_masks(dream.model)
    _refuse_masks(dream.guide)
    run = functools.partial(
        programs.run, params=params, mutable=mutable, particles=-dream.layout.ndim
    )
    held = subsample_values(dream.model)
    guide = run(programs.guide, rng_key=keys[1], args=dream.args, kwargs=dream.kwargs, values=held)
    model = run(
        programs.model,
        rng_key=keys[2],
        args=args,
        kwargs=kwargs,
        values={**sampled_values(dream.model), **sampled_values(guide)},
        dreaming=Dreaming(),
    )
    pair = (keys[1], keys[2])
    at_dream = Wake(dream.model, dream.guide, dream.layout, 1, dream.keys).log_weights[0]
    particles = Wake(model, guide, dream.layout, programs.num_particles, pair).log_weights
    return logsumexp(particles / 2, 0) - math.log(len(particles)) - at_dream / 2


def _refuse_masks(trace: Trace) -> None:
    """The sum over x runs over whole data: a masked part has no place in it."""
    for name, site in stochastic_sites(trace):
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            if getattr(fn, "_mask", True) is not True:
                raise ValueError(
                    f"site {name!r} is masked: log_partition sums over whole data, of which no "
                    "part can be left out. Call it with programs and data without masks."
                )
            fn = fn.base_dist


def _check_ratio(fine: np.ndarray) -> None:
    if not fine.all():
        raise ValueError(
            f"the ratio of guide and model at {int((~fine).sum())} of {len(fine)} dreams is not a "
            "number: look for overflowing parameters"
        )


def _relative_error(sums: np.ndarray, count: int) -> np.ndarray:
    """Of the mean of r: ``√(var r / count) / mean r``, from logsumexp of log r and 2 log r."""
    if count < 2:
        return np.full_like(sums[0], math.nan)
    ratio = count * np.exp(sums[1] - 2 * sums[0]) - 1
    return np.sqrt(np.maximum(ratio, 0) / (count - 1))
