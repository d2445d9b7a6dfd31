"""Held-out log-likelihood by importance sampling, streamed over the particles."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from tqdm.auto import tqdm

from .arguments import Arguments
from .options import check_counts
from .parameters import signature
from .sites import subsample_values
from .trace import Params, Programs

__all__ = ["LogLikelihood", "log_likelihood"]


@dataclasses.dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Importance-sampling estimates of ``log p(x)``, one per datum.

    Attributes:
        values: ``log p(x_b) ~ logsumexp_s log w[s, b] - log S``, shape ``(n_data,)``.
        ess: effective sample size ``(sum_s w)^2 / sum_s w^2`` of each datum, shape ``(n_data,)``,
            between 1 and ``num_particles``.
        num_particles: the number S of particles of each datum.
        tail: the ``M + 1`` largest log-weights of each datum, largest first, shape
            ``(n_data, min(S, M + 1))`` with ``M = ceil(min(S / 5, 3 sqrt(S)))``, a NumPy array
            in float64.
    """

    values: Array
    ess: Array
    num_particles: int
    tail: np.ndarray = dataclasses.field(repr=False)

    @property
    def mean(self) -> float:
        """The mean of ``values`` over the data."""
        return float(np.asarray(self.values, np.float64).mean())

    @property
    def stderr(self) -> float:
        """The standard error of ``mean`` over the data (NaN for a single datum)."""
        n = len(self.values)
        if n == 1:
            return math.nan
        return float(np.asarray(self.values, np.float64).std(ddof=1)) / math.sqrt(n)

    @functools.cached_property
    def khat(self) -> Array:
        """PSIS's Pareto shape of the largest weights of each datum, shape ``(n_data,)``.

        Above 0.7 the estimate of that datum is not to be trusted; ``inf`` where the tail holds
        fewer than five distinct weights (``num_particles`` too small). Equal to what
        ``arviz.psislw`` gives on all S weights, which depends on the ``M + 1`` largest alone.

        Raises:
            ImportError: if arviz is not installed.
        """
        import arviz

        size = _tail_size(self.num_particles)
        if self.num_particles <= size:
            return jnp.full_like(self.values, math.inf)
        # Repeating the smallest kept weight, the cutoff, up to 5 M values gives psislw the same
        # tail of M: its length is min(n / 5, 3 sqrt(n / reff)), and reff makes the first bind.
        tail = np.pad(self.tail, ((0, 0), (0, 4 * size - 1)), mode="edge")
        _, khat = arviz.psislw(tail, reff=1 / self.num_particles)
        return jnp.asarray(np.asarray(khat), self.values.dtype)

    def __repr__(self) -> str:
        return (
            f"LogLikelihood(mean={self.mean:.4f}, stderr={self.stderr:.4f}, "
            f"n_data={len(self.values)}, num_particles={self.num_particles})"
        )


def log_likelihood(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 10_000,
    particles_at_once: int = 100,
    batch: int | None = None,
    power: float = 1.0,
    mutable_state: Params | None = None,
    max_plate_nesting: float = math.inf,
    progress: bool = False,
    **kwargs: Any,
) -> LogLikelihood:
    """Estimates ``log p(x_b)`` of every datum with the guide as the proposal.

    ``log p(x_b) ~ logsumexp_s log w[s, b] - log S`` with ``w = p(x_b, h_s) / q(h_s | x_b)``,
    unscaled. Particles are drawn ``particles_at_once`` at a time and only running sums and the
    tail of the largest weights are kept, so S = 10,000 needs hardly more memory than S = 100.
    A pass is compiled once for each shape of the data and kept for the next call with the same
    programs; what they read from outside their arguments is read when it is compiled, as under
    ``jax.jit``.

    Args:
        rng_key: random key.
        params: the parameters as ``get_params`` gives them.
        model: the generative program, called as ``model(*args, **kwargs)``.
        guide: the recognition program, called with the same arguments.
        *args: arguments of both programs.
        num_particles: the number S of particles for each datum.
        particles_at_once: how many of them run in one vectorised pass.
        batch: the number of data evaluated together; all by default. Every array among the
            arguments whose first dimension is as long as that of the first array is sliced.
        power: a, estimates ``1/a · (logsumexp_s a log w − log S)``: 1 for ``log p(x)``, ½ for
            the bidirectional machine's ``log p̃*(x)``. ``ess`` and ``khat`` are those of ``wᵃ``.
        mutable_state: state of mutable sites, as the optimisation's state holds it.
        max_plate_nesting: the plates nested in the programs; found by a run if infinite.
        progress: whether to show a progress bar.
        **kwargs: keyword arguments of both programs.

    Returns:
        ``values``, ``ess`` and ``khat`` for each datum, and ``mean`` and ``stderr`` over the data.

    Raises:
        ValueError: if a count is no int of at least 1, if ``power`` is not positive, if there are
            no data, if a log-weight is NaN or ``+inf``, if no particle of a datum has a positive
            weight, or if ``batch`` is given and the weights do not separate by datum.
    """
    check_counts(num_particles=num_particles, particles_at_once=particles_at_once)
    if not power > 0:
        raise ValueError(f"power must be positive, got {power!r}")
    starts, take = in_batches(args, kwargs, batch)
    mutable = mutable_state or {}
    size = min(particles_at_once, num_particles)
    model, guide = hashable(model), hashable(guide)
    nesting = max_plate_nesting
    if math.isinf(nesting):
        nesting = looked_at(rng_key, params, model, guide, args, kwargs, mutable)
    weigh = _weigher(model, guide, size, int(nesting))
    results = []
    with tqdm(total=len(starts) * num_particles, unit="particle", disable=not progress) as bar:
        for start in starts:
            width, these = take(start)
            arguments = Arguments.of(these)
            moments = _Moments(num_particles)
            subsample: Params = {}
            for done in range(0, num_particles, size):
                rng_key, key = random.split(rng_key)
                wanted = min(size, num_particles - done)
                # All particles are of the same data: later ones take the first ones' subsample.
                found, subsample = weigh(key, params, mutable, arguments, subsample)
                weights = np.asarray(found)[:wanted]
                check_width(width, weights.shape[1])
                moments.add(power * weights, first_datum=start)
                bar.update(wanted)
            results.append(moments.finish(first_datum=start))
    values, ess, tail = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return LogLikelihood(jnp.asarray(values / power), jnp.asarray(ess), num_particles, tail)


def check_width(width: int | None, found: int) -> None:
    """Refuse a batch whose data do not separate."""
    if width is not None and found != width:
        raise ValueError(
            f"batch= gave {width} data and {found} log-weights: the weights of this program do "
            "not separate by datum; leave batch out"
        )


def in_batches(
    args: tuple, kwargs: dict[str, Any], batch: int | None
) -> tuple[range, Callable[[int], tuple[int | None, tuple]]]:
    """Split the programs' arguments along the data.

    Returns:
        The first datum of each batch, and a function from it to the batch's width and ``(args,
        kwargs)``. All data in one batch of width None if ``batch`` is None.

    Raises:
        ValueError: no data, a ``batch`` below 1, or no array to slice.
    """
    if batch is not None:
        check_counts(batch=batch)
    first = next((x for x in jax.tree.leaves((args, kwargs)) if _is_array(x)), None)
    n_data = None if first is None or first.ndim == 0 else len(first)
    if n_data == 0:
        raise ValueError("there are no data: the first array argument is empty")
    if batch is None:
        return range(1), lambda start: (None, (args, kwargs))
    if n_data is None:
        raise ValueError("batch= needs an array with a data dimension among the arguments")

    def take(start: int) -> tuple[int | None, tuple]:
        stop = min(start + batch, n_data)
        return stop - start, _slice((args, kwargs), n_data, slice(start, stop))

    return range(0, n_data, batch), take


def hashable(program: Callable) -> Callable:
    """A program as a key of a cache; one without a hash, such as an Equinox module, wrapped.

    Such a program is compiled anew in each call.
    """
    try:
        hash(program)
    except TypeError:
        return functools.partial(program)
    return program


def looked_at(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    mutable: Params,
    max_plate_nesting: float = math.inf,
) -> int:
    """Refuse bad programs and data.

    Returns:
        The number of plate dimensions.
    """
    shapes = signature((params, mutable, Arguments.of((args, kwargs))))
    programs = _looker(model, guide, max_plate_nesting, shapes)
    programs.inspect(rng_key, args, kwargs, params, mutable)
    return int(programs.max_plate_nesting)


@functools.lru_cache(maxsize=32)
def _looker(model: Callable, guide: Callable, nesting: float, shapes: tuple) -> Programs:
    """The programs that look at arguments of these shapes, compiled by the first of them."""
    return Programs(model, guide, max_plate_nesting=nesting, constrained=True)


@functools.lru_cache(maxsize=32)
def _weigher(model: Callable, guide: Callable, num_particles: int, nesting: int) -> Callable:
    """A compiled pass.

    Returns:
        ``(key, params, mutable, arguments, subsample) -> (log w, subsample)``: log-weights
        (particles, n_data), and the indices of subsampled plates, by name.
    """
    programs = Programs(model, guide, num_particles, nesting, constrained=True)

    def weigh(
        rng_key: Array, params: Params, mutable: Params, arguments: Arguments, subsample: Params
    ) -> tuple[Array, Params]:
        args, kwargs = arguments.rebuilt()
        wake = programs.wake(rng_key, params, args, kwargs, subsample, mutable=mutable)
        return wake.log_weights, subsample_values(wake.guide)

    return jax.jit(weigh)


class _Moments:
    """Running logsumexp of ``log w`` and ``2 log w``, and the largest weights, per datum."""

    def __init__(self, num_particles: int):
        self.num_particles = num_particles
        self.keep = min(num_particles, _tail_size(num_particles) + 1)
        self.sums = np.array(-math.inf)  # then (2, n_data)
        self.parts: list[np.ndarray] = []  # each (n_data, some particles), float64
        self.dtype = np.dtype(np.float32)

    def add(self, weights: np.ndarray, first_datum: int) -> None:
        """Adds log-weights of shape ``(particles, n_data)``."""
        if not weights.shape[1]:
            raise ValueError("log_likelihood got no data: the programs hold no datum")
        bad = ~(weights < math.inf)  # NaN and +inf; -inf is a weight of zero
        if bad.any():
            s, b = (int(i[0]) for i in bad.nonzero())
            raise ValueError(
                f"the log-weight log p - log q of datum {first_datum + b} is "
                f"{float(weights[s, b])} ({int(bad.any(0).sum())} of {weights.shape[1]} data are "
                "affected): look for NaN data, overflowing parameters or a guide of density 0"
            )
        self.dtype = weights.dtype
        weights = weights.astype(np.float64)
        sums = np.stack([_logsumexp(weights), _logsumexp(2 * weights)])
        self.sums = np.logaddexp(self.sums, sums)
        self.parts.append(weights.T)
        if sum(part.shape[1] for part in self.parts) >= 4 * self.keep:
            self._prune()

    def _prune(self) -> None:
        kept = -np.concatenate(self.parts, 1)
        count = min(self.keep, kept.shape[1])
        self.parts = [-np.sort(np.partition(kept, count - 1, axis=1)[:, :count], axis=1)]

    def finish(self, first_datum: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns values ``(n_data,)``, ESS ``(n_data,)`` and the tail ``(n_data, kept)``."""
        self._prune()
        one, two = self.sums
        dead = np.flatnonzero(one == -math.inf)
        if len(dead):
            raise ValueError(
                f"all {self.num_particles} log-weights of datum {first_datum + int(dead[0])} are "
                f"-inf ({len(dead)} of {len(one)} data are affected): the model gives them "
                "density 0"
            )
        values = one - math.log(self.num_particles)
        ess = np.exp(2 * one - two)
        return values.astype(self.dtype), ess.astype(self.dtype), self.parts[0]


def _logsumexp(value: np.ndarray) -> np.ndarray:
    """Over the first dimension, float64."""
    top = value.max(0)
    finite = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return finite + np.log(np.exp(value - finite).sum(0))


def _tail_size(num_particles: int) -> int:
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _slice(tree: Any, n_data: int, index: slice) -> Any:
    """Slices every array of the nested ``tree`` whose first dimension is ``n_data``."""
    return jax.tree.map(
        lambda x: x[index] if _is_array(x) and x.ndim and len(x) == n_data else x, tree
    )
