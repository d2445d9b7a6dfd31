"""Missing data by a Markov chain through the latents (appendix F, Rezende et al. 2014).

``h ~ q(h | v_o, v_m)``, then ``v_m ~ p(v_m | h)``, again and again from a random start. If the
guide is the exact posterior, the chain's stationary distribution is ``p(v_m | v_o)``; with
any other guide it is an approximation to it (equations 41 to 44).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from .arguments import Arguments
from .checks import Trace, check_against_model
from .evaluation import hashable
from .messengers import Dreaming
from .options import check_counts
from .pairing import pair_dreams
from .parameters import Params
from .sites import in_data_type, mutable_values, sampled_values
from .trace import Programs

__all__ = ["impute"]


def impute(
    rng_key: Array,
    params: Params,
    model: Callable,
    guide: Callable,
    x: Any,
    observed_mask: Any,
    num_steps: int,
    *args: Any,
    keep: int = 0,
    start: Any = None,
    mutable_state: Params | None = None,
    **kwargs: Any,
) -> Array:
    """Fill in the missing entries of ``x``, for all data at once.

    The programs are called as ``program(x, *args, **kwargs)``, or as ``program(*args, **kwargs)``
    if x itself (the same object) is among these arguments. What the guide and the model see in
    its place is the chain's current state. Other observed sites keep their values. The chain is
    compiled, a ``lax.scan``.

    Args:
        rng_key: random key. params: constrained, by name, as ``get_params`` gives them.
        model: a program that observes x. guide: its recognition program.
        x: the data, any shape (N, ...); missing entries may hold anything, also NaN.
        observed_mask: bool, shape of x, True where x is observed.
        num_steps: steps of the chain, at least 1.
        *args: the programs' other arguments.
        keep: 0 returns the chain's last state; n > 0 the mean of its last n states.
        start: missing entries start from it, shape of x; None draws them from the model.
        mutable_state: state of mutable sites; it does not change.
        **kwargs: the programs' keyword arguments.

    Returns:
        Shape and type of x (floating point if ``keep`` > 0); observed entries are unchanged.

    Raises:
        ValueError: a mask that does not fit, a count out of its range, a site that does not
            observe x itself, or a guide whose latents are not the model's.
    """
    _check(x, observed_mask, num_steps, keep, start)
    _check_observed(x, observed_mask)
    if not any(leaf is x for leaf in jax.tree.leaves((args, kwargs))):
        args = (x, *args)
    chain = _compiled(hashable(model), hashable(guide))
    arguments = Arguments.of((x, args, kwargs))
    given = (arguments, jnp.asarray(observed_mask), start, params, mutable_state or {})
    return chain(rng_key, *given, num_steps=num_steps, keep=keep)


@functools.lru_cache(maxsize=32)
def _compiled(model: Callable, guide: Callable) -> Callable:
    """The whole chain as a compiled function."""
    return jax.jit(functools.partial(_run, model, guide), static_argnames=("num_steps", "keep"))


def _run(
    model: Callable,
    guide: Callable,
    rng_key: Array,
    arguments: Arguments,
    mask: Array,
    start: Any,
    params: Params,
    mutable: Params,
    *,
    num_steps: int,
    keep: int,
) -> Array:
    x, args, kwargs = arguments.rebuilt()
    chain = _Chain(model, guide, x, args, kwargs, params, mutable)
    start_key, check_key, chain_key = random.split(rng_key, 3)
    site, dream = chain.find_site(start_key)
    first = jnp.where(mask, x, dream if start is None else jnp.asarray(start, x.dtype))
    chain.step(check_key, site, first, check=True)
    mean_type = jnp.result_type(x.dtype, float) if x.dtype.kind in "biu" else x.dtype

    def advance(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        state, total = carry
        state = jnp.where(mask, x, chain.step(key, site, state))
        return (state, total + state.astype(mean_type)), None

    keys, total = random.split(chain_key, num_steps), jnp.zeros(x.shape, mean_type)
    burnt = num_steps - keep
    (state, _), _ = lax.scan(advance, (first, total), keys[:burnt])
    if not keep:
        return state
    (_, total), _ = lax.scan(advance, (state, total), keys[burnt:])
    return jnp.where(mask, x.astype(mean_type), total / keep)


class _Chain:
    """One step of the chain: latents from the guide, then the data from the model."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        x: Array,
        args: tuple,
        kwargs: dict[str, Any],
        params: Params,
        mutable: Params,
    ) -> None:
        self.programs = Programs(model, guide, constrained=True)
        self.x, self.args, self.kwargs = x, args, kwargs
        self.params, self.mutable = params, mutable

    def find_site(self, rng_key: Array) -> tuple[str, Array]:
        """The site that observes x, and a draw of it from the model.

        Raises:
            ValueError: none, more than one, or one that draws another shape, or fractions where
                x has integers.
        """
        dreaming = _DreamingOf(self.x)
        trace = self._run(self.programs.model, rng_key, self.args, self.kwargs, dreaming=dreaming)
        sites = sorted(dreaming.observed)
        if len(sites) != 1:
            known = sorted(
                n for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]
            )
            what = f"sites {sites} observe x" if sites else f"no site observes x, of {known}"
            raise ValueError(
                f"{what}: imputation needs exactly one site that observes the argument itself "
                "(obs=x)."
            )
        value = trace[sites[0]]["value"]
        if value.shape != self.x.shape:
            raise ValueError(
                f"site {sites[0]!r} draws shape {value.shape} but x has {self.x.shape}."
            )
        dtype = in_data_type(trace[sites[0]], self.x).dtype
        if dtype != self.x.dtype:
            raise ValueError(
                f"site {sites[0]!r} draws {dtype} but x is {self.x.dtype}, which would cut off "
                "fractions. Give x as floating-point numbers."
            )
        return sites[0], value.astype(self.x.dtype)

    def step(self, rng_key: Array, site: str, state: Array, *, check: bool = False) -> Array:
        """The next draw of the data, all entries of it."""
        guide_key, model_key = random.split(rng_key)
        guide = self._latents(guide_key, site, state)
        args, kwargs = self._arguments(self.programs.model, site, state)
        dreaming = _DreamingOf(state)
        model = self._run(
            self.programs.model,
            model_key,
            args,
            kwargs,
            values=sampled_values(guide),
            mutable={**self.mutable, **mutable_values(guide)},
            dreaming=dreaming,
        )
        if check:
            drawn = {name: s for name, s in model.items() if name not in dreaming.observed}
            check_against_model(drawn, guide)
        return model[site]["value"].astype(self.x.dtype)

    def _latents(self, rng_key: Array, site: str, state: Array) -> Trace:
        args, kwargs = self._arguments(self.programs.guide, site, state)
        return self._run(self.programs.guide, rng_key, args, kwargs)

    def _arguments(self, program: Callable, site: str, state: Array) -> tuple[tuple, dict]:
        observed, dreams = {site: self.x}, {site: state}
        args, kwargs, _ = pair_dreams(observed, dreams, self.args, self.kwargs, program, None)
        return args, kwargs

    def _run(
        self,
        program: Callable,
        rng_key: Array,
        args: tuple,
        kwargs: dict[str, Any],
        **options: Any,
    ) -> Trace:
        mutable = options.pop("mutable", self.mutable)
        run = self.programs.run
        return run(program, rng_key, self.params, args, kwargs, mutable=mutable, **options)


class _DreamingOf(Dreaming):
    """Turn the sites that observe one object into sampled ones."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def process_message(self, msg: Any) -> None:
        """Have such a site drawn."""
        if msg["type"] == "sample" and msg["value"] is self.value:
            super().process_message(msg)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _check(x: Any, mask: Any, num_steps: Any, keep: Any, start: Any) -> None:
    if not _is_array(x) or x.size == 0:
        raise ValueError(f"x must be an array with data in it, got {x!r}.")
    if not _is_array(mask) or mask.dtype != bool or mask.shape != x.shape:
        got = f"{mask.dtype} {mask.shape}" if _is_array(mask) else f"{mask!r}"
        raise ValueError(
            f"observed_mask must be bool and of x's shape {x.shape}, True where x is observed; "
            f"got {got}."
        )
    check_counts(num_steps=num_steps)
    if not (isinstance(keep, int) and 0 <= keep <= num_steps):
        raise ValueError(f"keep must be between 0 and num_steps={num_steps}, got {keep!r}.")
    if start is not None and jnp.shape(start) != x.shape:
        raise ValueError(f"start must have x's shape {x.shape}, got {jnp.shape(start)}.")


def _check_observed(x: Any, mask: Any) -> None:
    """Refuse NaN among what is observed, where it is concrete."""
    if isinstance(x, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    if np.isnan(np.where(mask, x, 0)).any():
        raise ValueError("x is NaN in entries that observed_mask calls observed.")
