"""What is looked at once, when programs first run: what would give wrong numbers in silence.

All of it is found in the traced programs; nothing is computed for it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr

from .checks import PARTICLES, Trace, mixes_particles, stochastic_sites
from .messengers import Dreaming
from .pairing import dreams_unread, pair_dreams, reads_its_data, with_dreams
from .parameters import Params
from .sites import site_log_prob, subsample_values

if TYPE_CHECKING:
    from .trace import Programs


def check_particles(programs: Programs, run: Callable, trace: Trace) -> None:
    """Refuse a program in which a site depends on latents, but not particle by particle.

    Args:
        run: the program, given ``values``. trace: of it, with particles.
    """
    sites = dict(stochastic_sites(trace))
    shared = [name for name, site in sites.items() if site["helmholtz_shared"]]
    if programs.num_particles == 1 or not shared:
        return
    latent = {n: site["value"] for n, site in sites.items() if not site["is_observed"]}

    def log_probs(latent: dict[str, Array]) -> list[Array]:
        again = run(values={**subsample_values(trace), **latent})
        return [site_log_prob(again[name]) for name in shared]

    for name, used in zip(shared, _dependence(log_probs, latent), strict=False):
        if used - {name}:
            raise mixes_particles(name)


def check_more_particles(
    programs: Programs,
    rng_key: Array,
    params: Params,
    args: tuple,
    kwargs: dict[str, Any],
    mutable: Params | None,
    *traces: Trace,
) -> None:
    """Where K is the size of a plate too, run with one more: one may be taken for the other.

    An index such as ``w[i]`` would find particles, and nothing would be amiss but the numbers.

    Args:
        programs: of both. rng_key, params, args, kwargs, mutable: of its ``wake``.
        traces: of both programs.
    """
    frames = [f for t in traces for _, s in stochastic_sites(t) for f in s["cond_indep_stack"]]
    sizes = {frame.size for frame in frames if frame.name != PARTICLES}
    if programs.num_particles > 1 and programs.num_particles in sizes:
        more = copy.copy(programs)
        more.num_particles, more.woken = programs.num_particles + 1, True
        look = partial(more.wake, args=args, kwargs=kwargs, mutable=mutable)
        jax.eval_shape(lambda *to: look(*to).log_weights, rng_key, params)


def check_own_dreams(
    programs: Programs,
    run: Callable,
    rng_key: Array,
    observed: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
    subsample: dict[str, Array] | None,
) -> None:
    """Refuse a model some site of which is computed from an argument that it observes.

    Args:
        run: the programs. rng_key: of the model. observed: its data, by site.
        args, kwargs: of the call. subsample: indices of subsampled plates.
    """
    names: list[str] = []

    def draw(data: dict[str, Array]) -> list[Array]:
        new_args, new_kwargs, _ = with_dreams(observed, data, args, kwargs)
        trace = run(
            programs.model,
            rng_key,
            args=new_args,
            kwargs=new_kwargs,
            values=subsample,
            dreaming=Dreaming(),
        )
        names[:] = [name for name, _ in stochastic_sites(trace)]
        return [trace[name]["value"] for name in names]

    found = with_dreams(observed, observed, args, kwargs)[2]
    dependence = _dependence(draw, {name: observed[name] for name in found})
    for name, used in zip(names, dependence, strict=False):
        if used:
            raise reads_its_data(name, found)


def check_reads_dreams(
    programs: Programs,
    run: Callable,
    params: Params,
    guide: Trace,
    observed: dict[str, Any],
    dreams: dict[str, Array],
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Warn of guide sites with parameters that see no dream, directly or by other sites.

    Args:
        run: the guide. params: by name. guide: its trace on the dreams. observed: the data.
        dreams: in their place. args, kwargs: of the call.
    """
    sites = dict(stochastic_sites(guide))
    latent = {name: site["value"] for name, site in sites.items() if not site["is_observed"]}

    def log_probs(inputs: dict[tuple[str, str], Array]) -> list[Array]:
        of = {kind: {n: x for (k, n), x in inputs.items() if k == kind} for kind in "dlp"}
        new = pair_dreams(observed, of["d"], args, kwargs, programs.guide, programs.dream_args)
        values = {**subsample_values(guide), **of["l"]}
        trace = run(args=new[0], kwargs=new[1], values=values, params=of["p"])
        return [site_log_prob(trace[name]) for name in latent]

    inputs = {("d", name): x for name, x in dreams.items()}
    inputs |= {("l", name): x for name, x in latent.items()}
    inputs |= {("p", name): x for name, x in params.items()}
    found = []
    for name, used in zip(latent, _dependence(log_probs, inputs), strict=False):
        kinds = {kind for kind, other in used if (kind, other) != ("l", name)}
        if kinds == {"p"}:
            found.append(name)
    if found:
        warnings.warn(dreams_unread(found), UserWarning, stacklevel=2)


def _dependence(fn: Callable, inputs: dict[Any, Any]) -> list[set]:
    """On which of its inputs, by key, each of the arrays in a function's list depends.

    Nothing of a function that looks at values, which runs on concrete data alone.
    """
    leaves, tree = jax.tree.flatten(list(inputs.values()))
    keys = [key for key, value in inputs.items() for _ in jax.tree.leaves(value)]
    count = 0

    def flat(*leaves: Array) -> list[Array]:
        nonlocal count
        found = fn(dict(zip(inputs, jax.tree.unflatten(tree, leaves), strict=True)))
        count = len(found)
        return found

    try:
        program = jax.make_jaxpr(flat)(*leaves).jaxpr
    except jax.errors.JAXTypeError:
        return []
    wanted = range(count)
    used = [dce_jaxpr(program, [i == j for j in wanted])[1] for i in wanted]
    return [{key for key, flag in zip(keys, flags, strict=True) if flag} for flags in used]
