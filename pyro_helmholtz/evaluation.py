"""Held-out log-likelihood by importance sampling, streamed over the particles."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .options import check_counts
from .pairing import is_sequence, rebuilt
from .sites import only_subsamples
from .trace import guess_max_plate_nesting, wake_trace

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
            ``(n_data, min(S, M + 1))`` with ``M = ceil(min(S / 5, 3 sqrt(S)))``, in float64.
    """

    values: Tensor
    ess: Tensor
    num_particles: int
    tail: Tensor = dataclasses.field(repr=False)

    @property
    def mean(self) -> float:
        """The mean of ``values`` over the data."""
        return self.values.double().mean().item()

    @property
    def stderr(self) -> float:
        """The standard error of ``mean`` over the data (NaN for a single datum)."""
        n = len(self.values)
        return self.values.double().std().item() / math.sqrt(n) if n > 1 else math.nan

    @functools.cached_property
    def khat(self) -> Tensor:
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
            return torch.full_like(self.values, math.inf)
        # Repeating the smallest kept weight, the cutoff, up to 5 M values gives psislw the same
        # tail of M: its length is min(n / 5, 3 sqrt(n / reff)), and reff makes the first bind.
        tail = np.pad(self.tail.numpy(), ((0, 0), (0, 4 * size - 1)), mode="edge")
        _, khat = arviz.psislw(tail, reff=1 / self.num_particles)
        return torch.as_tensor(np.asarray(khat)).to(self.values)

    def __repr__(self) -> str:
        return (
            f"LogLikelihood(mean={self.mean:.4f}, stderr={self.stderr:.4f}, "
            f"n_data={len(self.values)}, num_particles={self.num_particles})"
        )


def log_likelihood(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 10_000,
    particles_at_once: int = 100,
    batch: int | None = None,
    power: float = 1.0,
    max_plate_nesting: float = math.inf,
    progress: bool = False,
    **kwargs: Any,
) -> LogLikelihood:
    """Estimates ``log p(x_b)`` of every datum with the guide as the proposal.

    ``log p(x_b) ~ logsumexp_s log w[s, b] - log S`` with ``w = p(x_b, h_s) / q(h_s | x_b)``,
    unscaled. Particles are drawn ``particles_at_once`` at a time and only running sums and the
    tail of the largest weights are kept, so S = 10,000 needs hardly more memory than S = 100.
    Nothing is differentiated and no parameter is changed; modules with a training mode run in the
    mode they are in.

    Args:
        model: the generative program, called as ``model(*args, **kwargs)``.
        guide: the recognition program, called with the same arguments.
        *args: arguments of both programs.
        num_particles: the number S of particles for each datum.
        particles_at_once: how many of them run in one vectorised pass.
        batch: the number of data evaluated together; all by default. Every tensor among the
            arguments whose first dimension is as long as that of the first tensor is sliced.
        power: a, estimates ``1/a · (logsumexp_s a log w − log S)``: 1 for ``log p(x)``, ½ for
            the bidirectional machine's ``log p̃*(x)``. ``ess`` and ``khat`` are those of ``wᵃ``.
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
    results: list[tuple] = []
    validated: set[str] = set()
    with (
        torch.no_grad(),
        tqdm(total=len(starts) * num_particles, unit="particle", disable=not progress) as bar,
    ):
        for start in starts:
            width, these = take(start)
            if math.isinf(max_plate_nesting):
                max_plate_nesting = guess_max_plate_nesting(model, guide, *these)
            moments, subsample = _Moments(num_particles), None
            for done in range(0, num_particles, particles_at_once):
                size = min(particles_at_once, num_particles - done)
                wake = wake_trace(
                    model,
                    guide,
                    *these,
                    num_particles=size,
                    max_plate_nesting=max_plate_nesting,
                    samples=subsample,
                    validated=validated,
                )
                subsample = only_subsamples(wake.guide)  # all particles are of the same data
                weights = wake.log_weights
                check_width(width, weights.shape[1])
                moments.add(power * weights.detach(), first_datum=start)
                bar.update(size)
            results.append(moments.finish(first_datum=start))
    values, ess, tail = (torch.cat(parts) for parts in zip(*results, strict=True))
    return LogLikelihood(values=values / power, ess=ess, num_particles=num_particles, tail=tail)


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
        ValueError: no data, a ``batch`` below 1, or no tensor to slice.
    """
    if batch is not None:
        check_counts(batch=batch)
    first = next(_tensors((args, kwargs)), None)
    n_data = None if first is None or first.dim() == 0 else len(first)
    if n_data == 0:
        raise ValueError("there are no data: the first tensor argument is empty")
    if batch is None:
        return range(1), lambda start: (None, (args, kwargs))
    if n_data is None:
        raise ValueError("batch= needs a tensor with a data dimension among the arguments")

    def take(start: int) -> tuple[int | None, tuple]:
        stop = min(start + batch, n_data)
        return stop - start, _slice((args, kwargs), n_data, slice(start, stop))

    return range(0, n_data, batch), take


class _Moments:
    """Running logsumexp of ``log w`` and ``2 log w``, and the largest weights, per datum."""

    def __init__(self, num_particles: int):
        self.num_particles = num_particles
        self.keep = min(num_particles, _tail_size(num_particles) + 1)
        self.sums = torch.tensor(-math.inf, dtype=torch.float64)  # then (2, n_data)
        self.parts: list[Tensor] = []  # each (n_data, some particles), float64
        self.dtype, self.device = torch.get_default_dtype(), torch.device("cpu")

    def add(self, weights: Tensor, first_datum: int) -> None:
        """Adds log-weights of shape ``(particles, n_data)``."""
        if not weights.shape[1]:
            raise ValueError("log_likelihood got no data: the programs hold no datum")
        bad = ~(weights < math.inf)  # NaN and +inf; -inf is a weight of zero
        if bad.any():
            s, b = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"the log-weight log p - log q of datum {first_datum + b} is "
                f"{weights[s, b].item()} ({int(bad.any(0).sum())} of {weights.shape[1]} data are "
                "affected): look for NaN data, overflowing parameters or a guide of density 0"
            )
        self.dtype, self.device = weights.dtype, weights.device
        weights = (weights.cpu() if weights.device.type == "mps" else weights).double()
        sums = torch.stack([weights.logsumexp(0), (2 * weights).logsumexp(0)])
        self.sums = torch.logaddexp(self.sums, sums)
        self.parts.append(weights.T)
        if sum(part.shape[1] for part in self.parts) >= 4 * self.keep:
            self._prune()

    def _prune(self) -> None:
        kept = torch.cat(self.parts, 1)
        self.parts = [kept.topk(min(self.keep, kept.shape[1]), dim=1).values]

    def finish(self, first_datum: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns values ``(n_data,)``, ESS ``(n_data,)`` and the tail ``(n_data, kept)``."""
        self._prune()
        one, two = self.sums
        dead = (one == -math.inf).nonzero().flatten().tolist()
        if dead:
            raise ValueError(
                f"all {self.num_particles} log-weights of datum {first_datum + dead[0]} are -inf "
                f"({len(dead)} of {len(one)} data are affected): the model gives them density 0"
            )
        values = one - math.log(self.num_particles)
        ess = (2 * one - two).exp()
        like = {"dtype": self.dtype, "device": self.device}
        return values.to(**like), ess.to(**like), self.parts[0].cpu()


def _tail_size(num_particles: int) -> int:
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def _tensors(tree: Any):
    """Yields the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _slice(tree: Any, n_data: int, index: slice) -> Any:
    """Slices every tensor of the nested ``tree`` whose first dimension is ``n_data``."""
    if isinstance(tree, Tensor):
        return tree[index] if tree.dim() and len(tree) == n_data else tree
    if isinstance(tree, dict):
        return {key: _slice(item, n_data, index) for key, item in tree.items()}
    if is_sequence(tree):
        return rebuilt(tree, (_slice(item, n_data, index) for item in tree))
    return tree
