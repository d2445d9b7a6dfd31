"""What is looked at once, when programs first run: what would give wrong numbers in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine

from .checks import PARTICLES, mixes_particles
from .layout import Site
from .messengers import Detached, Dreaming, record
from .pairing import dreams_unread, pair_dreams, reads_its_data
from .sites import parameters, stochastic_sites

if TYPE_CHECKING:
    from .trace import Programs


def check_particles(
    programs: Programs,
    program: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    trace: poutine.Trace,
    nesting: int,
) -> None:
    """Refuse a program in which a site depends on latents, but not particle by particle.

    Args:
        programs: that it is one of. program: the model or the guide. args, kwargs: of it.
        trace: of it, with particles. nesting: number of plate dimensions.
    """
    sites = dict(stochastic_sites(trace))
    shared = {name: site for name, site in sites.items() if site["helmholtz_shared"]}
    if programs.num_particles == 1 or not shared:
        return

    def log_probs(samples: poutine.Trace) -> dict[str, torch.Tensor]:
        # From the same random numbers each time, as of dropout.
        with _untouched(), torch.no_grad(), programs.particles(nesting):
            again: dict[str, Any] = dict(record(program, args, kwargs, samples).nodes)
        return {n: again[n]["fn"].log_prob(site["value"]) for n, site in shared.items()}

    apart = log_probs(trace)
    for particle in range(2):  # all alike: the first, then the second
        alike = trace.copy()
        for name, site in sites.items():
            dim = nesting + 1 + site["fn"].event_dim
            if not site["is_observed"] and site["value"].dim() == dim:
                value = site["value"][particle].expand_as(site["value"])
                alike.nodes[name] = {**site, "value": value}
        for name, value in log_probs(alike).items():
            if not _alike(apart[name], value):
                raise mixes_particles(name)


def check_more_particles(
    programs: Programs, args: tuple, kwargs: dict[str, Any], *traces: poutine.Trace
) -> None:
    """Where K is the size of a plate too, run with one more: one may be taken for the other.

    An index such as ``w[i]`` would find particles, and nothing would be amiss but the numbers.
    """
    frames = [f for t in traces for _, s in stochastic_sites(t) for f in s["cond_indep_stack"]]
    sizes = {frame.size for frame in frames if frame.name != PARTICLES}
    if programs.num_particles > 1 and programs.num_particles in sizes:
        more = replace(programs, num_particles=programs.num_particles + 1, validated={"wake"})
        with _untouched(), torch.no_grad():
            more.wake(args, kwargs)


def check_own_dreams(
    programs: Programs,
    trace: poutine.Trace,
    args: tuple,
    kwargs: dict[str, Any],
    found: set[str],
    known: poutine.Trace | None,
    random: tuple,
) -> None:
    """Refuse a model that dreams otherwise once its dreams are its arguments.

    Args:
        programs: the model's. trace: of its dreams on the data.
        args, kwargs: with the dreams in place of the data.
        found: observed sites whose data are arguments. known: subsample indices.
        random: the state of the random numbers before ``trace``.
    """
    if not found:
        return
    with _untouched(), torch.no_grad(), Detached(), Dreaming():
        _set_random_state(random)
        again = record(programs.model, args, kwargs, known)
    for name, site in stochastic_sites(trace):
        if _depends(site, again.nodes.get(name)):
            raise reads_its_data(name, found)


def check_reads_dreams(
    programs: Programs,
    trace: poutine.Trace,
    observed: dict[str, Any],
    dreams: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Warn of guide sites with parameters that see no dream, directly or by other sites.

    Whether integers are seen cannot be told: where a dream or another site is one, nothing is
    said.

    Args:
        trace: of the guide on the dreams. observed: the data. dreams: in their place.
        args, kwargs: of the call.
    """

    def followed(value: Any) -> Any:
        floats = torch.is_tensor(value) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if floats else None

    sites = dict(stochastic_sites(trace))
    latent = {n: followed(s["value"]) for n, s in sites.items() if not s["is_observed"]}
    seen = {name: followed(value) for name, value in dreams.items()}
    if None in seen.values():
        return
    samples = trace.copy()
    for name, value in latent.items():
        if value is not None:
            samples.nodes[name] = {**sites[name], "value": value}
    with _untouched(), torch.enable_grad():
        new = pair_dreams(observed, seen, args, kwargs, programs.guide, programs.dream_args)
        again = record(programs.guide, new[0], new[1], samples)
    leaves, nodes = list(parameters(again).values()), dict(again.nodes)
    found = []
    for name in latent:
        others = [value for other, value in latent.items() if other != name]
        if None in others:
            continue
        fn, value = nodes[name]["fn"], sites[name]["value"]
        if _depends_on(fn, value, leaves) and not _depends_on(fn, value, [*seen.values(), *others]):
            found.append(name)
    if found:
        warnings.warn(dreams_unread(found), UserWarning, stacklevel=2)


def _depends_on(fn: Any, value: torch.Tensor, inputs: list[torch.Tensor]) -> bool:
    """Whether a distribution has been computed from some of the tensors."""
    log_prob = fn.log_prob(value).sum()
    if not log_prob.requires_grad or not inputs:
        return False
    found = torch.autograd.grad(log_prob, inputs, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


@contextmanager
def _untouched() -> Iterator[None]:
    """Run programs to look at them: random numbers and modules' buffers are as before."""
    state = random_state()
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: torch.nn.Module, inputs: Any) -> None:
        for buffer in module.buffers(recurse=False):
            buffers.setdefault(id(buffer), (buffer, buffer.detach().clone()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        _set_random_state(state)
        for buffer, before in buffers.values():
            buffer.data.copy_(before)


def random_state() -> tuple:
    """Of all generators that a program may use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return pyro.util.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    pyro.util.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])


def _depends(site: Site, other: Site | None) -> bool:
    """Whether a site that was drawn twice by the same random numbers came out otherwise."""
    if other is None or other["value"].shape != site["value"].shape:
        return True
    return not _alike(site["fn"].log_prob(site["value"]), other["fn"].log_prob(site["value"]))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
