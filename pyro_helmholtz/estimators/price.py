"""Gradients of Gaussian expectations by Bonnet's and Price's theorems (appendix B, 2014).

``∇_μ E f = E ∇f`` and ``∇_C E f = ½ E ∇²f``. For ``z = loc + R ε`` with ``C = R Rᵀ`` and H the
Hessian, ``½ ⟨H, ∂C⟩ = ⟨H R, ∂R⟩ = E_v[(H R v)·(∂R v)]`` for any white v, so that one formula
serves every Gaussian family: the reparameterised gradient has ``∇f ε`` where this has
``(H R v) v``. Probing along ``R v`` makes the variance of a quadratic f for a diagonal scale
``Σ_{j≠i} H_ij² σ_j²``, which is never above that of the reparameterised gradient.

f must be twice differentiable: the kinks of a ReLU carry curvature that no Hessian sees.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..checks import is_stochastic
from ..distributions import RankOnePrecisionNormal
from ..fisher.families import unwrap
from ..layout import Layout, Site


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian site as ``loc + root(ε)``; both are differentiable in its arguments."""

    loc: Tensor
    root: Callable[[Tensor], Tensor]


def gaussian(fn: Any) -> Gaussian | None:
    """The location and the root of a Gaussian distribution; None for any other."""
    base = unwrap(fn)
    d = base.fn
    if base.transforms:
        return None
    if isinstance(d, RankOnePrecisionNormal):
        return Gaussian(d.loc, d.root)
    if isinstance(d, torch.distributions.Normal):
        return Gaussian(d.loc, lambda v: d.scale * v)
    if isinstance(d, torch.distributions.MultivariateNormal):
        tril = d._unbroadcasted_scale_tril
        return Gaussian(d.loc, lambda v: (tril @ v.unsqueeze(-1)).squeeze(-1))
    return None


class Gates(Messenger):
    """Keep each latent before and after a gate through which gradients flow until it is shut.

    Open, a derivative with respect to ``after[name]`` is the total one: it takes in what
    happens downstream at fixed noise. Shut, no gradient of anything passes a latent, so that
    what arrives at a parameter is its direct effect. Enter it outside ``poutine.trace``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self._open = [True]  # what the hooks see; they must not hold the tensors themselves

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if name in self.after or msg["is_observed"] or not is_stochastic(msg):
            return
        if torch.is_tensor(value) and value.requires_grad:
            is_open, after = self._open, value.view_as(value)
            after.register_hook(lambda grad: grad if is_open[0] else torch.zeros_like(grad))
            self.before[name], self.after[name] = value, after
            msg["value"] = after

    def shut(self) -> None:
        """Let no gradient through any more."""
        self._open[0] = False


def price_terms(
    objective: Tensor,
    sites: Mapping[str, Site],
    gates: Gates,
    layout: Layout,
    *,
    hessian: str,
    num_probes: int,
) -> Tensor:
    """The surrogate of everything that reaches the parameters through the latents.

    ``Σ_sites ⟨∇f, loc⟩ + ⟨H R v, R v⟩`` with constant first factors for Gaussian sites, and
    ``⟨∇f, z⟩``, the reparameterised gradient, for the others. Its gradient is meant to be taken
    with the gates shut, beside that of the objective itself.

    Args:
        objective: a scalar function of the latents. sites: of the guide, by name.
        gates: through which the guide was run, still open. layout: of the model.
        hessian: "probes" (Rademacher) or "exact" (all basis vectors).
        num_probes: products with the Hessian, each of all sites together.

    Returns:
        A scalar.
    """
    if not gates.after:
        return objective.new_zeros(())
    slopes = _grad(objective, gates.after, create_graph=True)
    known = {name: g for name in slopes if (g := gaussian(sites[name]["fn"])) is not None}
    total = objective.new_zeros(())
    for name, slope in slopes.items():
        reached = known[name].loc if name in known else gates.before[name]
        total = total + (slope.detach() * reached).sum()
    values = {name: gates.after[name] for name in known}
    if hessian == "probes":
        directions, weight = _probes(values, num_probes), 1 / num_probes
    else:
        directions, weight = _basis(values, sites, layout), 1.0
    for direction in directions:
        spread = {name: known[name].root(v) for name, v in direction.items()}
        along = sum((slopes[name] * moved.detach()).sum() for name, moved in spread.items())
        if torch.is_tensor(along) and along.requires_grad:
            curved = _grad(along, {name: values[name] for name in spread})
            for name, moved in spread.items():
                total = total + weight * (curved[name].detach() * moved).sum()
    return total


def _grad(
    scalar: Tensor, values: Mapping[str, Tensor], *, create_graph: bool = False
) -> dict[str, Tensor]:
    """Derivatives by name; the graph is kept, since the surrogate needs it."""
    grads = torch.autograd.grad(
        scalar,
        list(values.values()),
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(values, grads, strict=True))


def _probes(values: Mapping[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Independent signs at all sites; the terms between sites and data have mean zero."""
    for _ in range(count if values else 0):
        yield {name: _signs(torch.empty_like(value)) for name, value in values.items()}


def _signs(like: Tensor) -> Tensor:
    """Rademacher noise."""
    return like.detach().bernoulli_(0.5).mul_(2).sub_(1)


def _basis(
    values: Mapping[str, Tensor], sites: Mapping[str, Site], layout: Layout
) -> Iterator[dict[str, Tensor]]:
    """Each basis vector of each site, at all particles and data at once, with random signs.

    That is exact where particles, and data along the plates that all sites share, are
    independent, for then the Hessian has no entries between them and a sign meets itself. Should
    something couple them after all, such as batch normalisation, the signs keep it unbiased.
    """
    for name, value in values.items():
        batch = value.ndim - sites[name]["fn"].event_dim
        together = {batch - layout.ndim} | {batch + dim for dim in layout.shared}
        shape = [1 if d in together else size for d, size in enumerate(value.shape)]
        units = math.prod(shape)
        for i in range(units):
            unit = torch.zeros(units, dtype=value.dtype, device=value.device)
            unit[i] = 1.0
            signs = [size if d in together else 1 for d, size in enumerate(value.shape)]
            yield {name: unit.reshape(shape) * _signs(value.new_empty(signs))}


KINKS = ("Relu", "Threshold", "Hardtanh", "Hardshrink", "Hardswish", "Prelu", "MaxPool")


def warn_of_kinks(objective: Tensor, values: Mapping[str, Tensor]) -> None:
    """Warn if a function with kinks stands between a latent and the objective.

    Warns:
        UserWarning: naming the function.
    """
    ends = {value.grad_fn for value in values.values()}
    reaches: dict[Any, bool] = {}
    stack = [objective.grad_fn]
    while stack:
        node = stack[-1]
        children = [child for child, _ in node.next_functions if child is not None]  # type: ignore[union-attr]
        fresh = [child for child in children if child not in reaches and child not in ends]
        if fresh and node not in reaches:
            reaches[node] = False
            stack.extend(fresh)
            continue
        stack.pop()
        reaches[node] = any(child in ends or reaches.get(child, False) for child in children)
        kind = type(node).__name__
        if reaches[node] and any(name in kind for name in KINKS):
            warnings.warn(
                f"estimator='price' meets {kind.removesuffix('Backward0')} between a latent and "
                "the objective. Price's theorem needs a twice differentiable function: the "
                "curvature in a kink is not seen, so the gradient of the scale is biased. Use a "
                "smooth function (softplus, tanh, silu), or estimator='path'.",
                stacklevel=2,
            )
            return
