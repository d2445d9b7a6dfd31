"""Missing data by a Markov chain through the latents (appendix F, Rezende et al. 2014).

``h ~ q(h | v_o, v_m)``, then ``v_m ~ p(v_m | h)``, again and again from a random start. If the
guide is the exact posterior, the chain's stationary distribution is ``p(v_m | v_o)``; with
any other guide it is an approximation to it (equations 41 to 44).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .checks import check_against_model, check_observations
from .messengers import Dreaming
from .options import check_counts
from .pairing import is_sequence, pair_dreams
from .sites import in_data_type

__all__ = ["impute"]


def impute(
    model: Callable,
    guide: Callable,
    x: Tensor,
    observed_mask: Tensor,
    num_steps: int,
    *args: Any,
    keep: int = 0,
    start: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Fill in the missing entries of ``x``, for all data at once.

    The programs are called as ``program(x, *args, **kwargs)``, or as ``program(*args, **kwargs)``
    if x itself (the same object) is among these arguments. What the guide and the model see in
    its place is the chain's current state. Other observed sites keep their values. Nothing is
    differentiated and no parameter changes; random numbers are torch's.

    Args:
        model: a program that observes x. guide: its recognition program.
        x: the data, any shape (N, ...); missing entries may hold anything, also NaN.
        observed_mask: bool, shape of x, True where x is observed.
        num_steps: steps of the chain, at least 1.
        *args: the programs' other arguments.
        keep: 0 returns the chain's last state; n > 0 the mean of its last n states.
        start: missing entries start from it, shape of x; None draws them from the model.
        **kwargs: the programs' keyword arguments.

    Returns:
        Shape and type of x (floating point if ``keep`` > 0); observed entries are unchanged.

    Raises:
        ValueError: a mask that does not fit, a count out of its range, a site that does not
            observe x itself, or a guide whose latents are not the model's.
    """
    _check(x, observed_mask, num_steps, keep, start)
    if not _contains((args, kwargs), x):
        args = (x, *args)
    with torch.no_grad(), poutine.block():
        site, dream = _find_site(model, x, args, kwargs)
        state = torch.where(observed_mask, x, dream if start is None else start.to(x))
        chain = _Chain(model, guide, site, x, args, kwargs)
        chain.check(state)
        total = torch.zeros_like(state, dtype=_mean_type(x)) if keep else None
        with pyro.validation_enabled(False):
            for step in range(num_steps):
                state = torch.where(observed_mask, x, chain.step(state))
                if total is not None and step >= num_steps - keep:
                    total += state
    if total is None:
        return state
    return torch.where(observed_mask, x.to(total), total / keep)


class _Chain:
    """One step of the chain: latents from the guide, then the data from the model."""

    def __init__(
        self, model: Callable, guide: Callable, site: str, x: Tensor, args: tuple, kwargs: dict
    ) -> None:
        self.model, self.guide, self.site, self.x = model, guide, site, x
        self.args, self.kwargs = args, kwargs

    def _arguments(self, program: Callable, state: Tensor) -> tuple[tuple, dict[str, Any]]:
        observed, dreams = {self.site: self.x}, {self.site: state}
        args, kwargs, _ = pair_dreams(observed, dreams, self.args, self.kwargs, program, None)
        return args, kwargs

    def _latents(self, state: Tensor) -> poutine.Trace:
        args, kwargs = self._arguments(self.guide, state)
        return poutine.trace(self.guide).get_trace(*args, **kwargs)

    def check(self, state: Tensor) -> None:
        """Compare the programs' sites, once."""
        guide_trace = self._latents(state)
        args, kwargs = self._arguments(self.model, state)
        replayed = poutine.replay(self.model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        check_against_model(model_trace, guide_trace)
        check_observations(model_trace)

    def step(self, state: Tensor) -> Tensor:
        """The next draw of the data, all entries of it."""
        guide_trace = self._latents(state)
        args, kwargs = self._arguments(self.model, state)
        replayed = poutine.replay(self.model, trace=guide_trace)
        with _DreamingOf(self.site):
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        value: Any = model_trace.nodes[self.site]["value"]
        return value.to(self.x.dtype)


class _DreamingOf(Dreaming):
    """Turn one observed site into a sampled one."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            super()._pyro_sample(msg)


def _find_site(model: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[str, Tensor]:
    """The site that observes x, and a draw of it from the model.

    Raises:
        ValueError: none, more than one, or one that draws another shape, or fractions where x
            has integers.
    """
    dreaming = Dreaming()
    with dreaming, pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = [name for name, value in dreaming.observed.items() if value is x]
    if len(sites) != 1:
        known = sorted(dreaming.observed)
        what = f"sites {sites} observe x" if sites else f"no site observes x, of {known}"
        raise ValueError(
            f"{what}: imputation needs exactly one site that observes the argument itself (obs=x)."
        )
    site: Any = trace.nodes[sites[0]]
    value = site["value"]
    if value.shape != x.shape:
        raise ValueError(
            f"site {sites[0]!r} draws shape {tuple(value.shape)} but x has {tuple(x.shape)}."
        )
    dtype = in_data_type(site, x).dtype
    if dtype != x.dtype:
        raise ValueError(
            f"site {sites[0]!r} draws {dtype} but x is {x.dtype}, which would cut off fractions. "
            "Give x as floating-point numbers."
        )
    return sites[0], value.to(x.dtype)


def _check(x: Tensor, mask: Tensor, num_steps: int, keep: int, start: Tensor | None) -> None:
    if not torch.is_tensor(x) or x.numel() == 0:
        raise ValueError(f"x must be a tensor with data in it, got {x!r}.")
    if not torch.is_tensor(mask) or mask.dtype != torch.bool or mask.shape != x.shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else f"{mask!r}"
        raise ValueError(
            f"observed_mask must be bool and of x's shape {tuple(x.shape)}, True where x is "
            f"observed; got {got}."
        )
    check_counts(num_steps=num_steps)
    if not (isinstance(keep, int) and 0 <= keep <= num_steps):
        raise ValueError(f"keep must be between 0 and num_steps={num_steps}, got {keep!r}.")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must have x's shape {tuple(x.shape)}, got {tuple(start.shape)}.")
    if bool(torch.isnan(x[mask]).any()):
        raise ValueError("x is NaN in entries that observed_mask calls observed.")


def _mean_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _contains(tree: Any, x: Tensor) -> bool:
    if isinstance(tree, Mapping):
        return any(_contains(item, x) for item in tree.values())
    if is_sequence(tree):
        return any(_contains(item, x) for item in tree)
    return tree is x
