"""The Fisher information of any distribution in its own arguments.

A distribution without a registered function gets its information by differentiating its
Kullback-Leibler divergence from itself twice, which is exact; failing that, from its scores at
all values where these are few, else at samples, and the structure report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.transforms import AbsTransform, ComposeTransform, Transform

from .arguments import argument_names, event_dim, with_arguments
from .registry import Information, by_rule, has_rule

SCORE_SAMPLES = 512


@dataclass(slots=True)
class Base:
    """A distribution without its wrappers.

    Attributes:
        fn: the innermost distribution.
        transforms: the bijections taken off; the information does not cover their parameters.
        masks: masks taken off.
    """

    fn: Any
    transforms: list[Transform]
    masks: list[Any]


def unwrap(fn: Any) -> Base:
    """Take off Independent, masks, expansions and bijections.

    A fixed bijection changes neither the parameters nor their Fisher information. A transformed
    distribution stays whole if it has a rule of its own, or if values are lost (their sign).
    """
    transforms: list[Transform] = []
    masks: list[Any] = []
    while True:
        if isinstance(fn, torch.distributions.TransformedDistribution) and not has_rule(fn):
            parts = _parts(fn.transforms)
            if any(isinstance(transform, AbsTransform) for transform in parts):
                return Base(fn, transforms + parts, masks)
            transforms += parts
            fn = fn.base_dist
        elif isinstance(fn, dist.torch_distribution.MaskedDistribution):
            masks.append(fn._mask)
            fn = fn.base_dist
        elif isinstance(
            fn,
            (
                torch.distributions.Independent,
                dist.torch_distribution.ExpandedDistribution,
            ),
        ):
            fn = fn.base_dist
        else:
            return Base(fn, transforms, masks)


def _parts(transforms: list[Transform]) -> list[Transform]:
    parts: list[Transform] = []
    for transform in transforms:
        parts += transform.parts if isinstance(transform, ComposeTransform) else [transform]
    return parts


def constant_transforms(transforms: list[Transform]) -> bool:
    """Whether no transform holds a tensor that requires a gradient."""
    return not any(
        torch.is_tensor(v) and v.requires_grad for t in transforms for v in vars(t).values()
    )


def information(fn: Any, names: list[str] | None = None) -> tuple[Information, bool, str]:
    """The Fisher information of an unwrapped distribution.

    Args:
        fn: the distribution. names: its ``argument_names``, where they are known already.

    Returns:
        The information, whether it is exact, and how it was found.

    Raises:
        NotImplementedError: there is no rule for it, and it cannot be made again from its
            arguments.
        ValueError: its own rule is about other arguments than it has, or of another shape.
    """
    names = argument_names(fn) if names is None else names
    found = by_rule(fn, names)
    if found is not None:
        return found, True, "closed form"
    if not names:
        return {}, True, "no arguments"
    try:
        return _from_kl(fn, names), True, "second derivative of the KL divergence"
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        pass
    try:
        found, exact = _from_scores(fn, names)
    except NotImplementedError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise NotImplementedError(
            f"{type(fn).__name__} has no registered Fisher information, and its scores cannot be "
            f"sampled by its arguments {names} ({error}). Give one by @register_fisher."
        ) from error
    how = "sum over the support" if exact else f"Monte-Carlo scores ({SCORE_SAMPLES} samples)"
    return found, exact, how


def _check_elementwise(fn: Any, names: list[str]) -> None:
    for name in names:
        event = event_dim(fn, name)
        if event > 1 or (event == 1 and len(names) > 1):
            raise NotImplementedError(
                f"{type(fn).__name__} has no registered Fisher information: its argument "
                f"{name!r} is a matrix or mixes vectors with scalars. Give one by "
                "@register_fisher."
            )


def _as_information(names: list[str], matrix: Tensor, vector: bool) -> Information:
    if vector:
        return {names[0]: matrix}
    if len(names) == 1:
        return {names[0]: matrix[..., 0, 0]}
    return {tuple(names): matrix}


def _from_kl(fn: Any, names: list[str]) -> Information:
    _check_elementwise(fn, names)
    values = [getattr(fn, name).detach().clone().requires_grad_() for name in names]
    with torch.enable_grad():
        other = with_arguments(fn, dict(zip(names, values, strict=True)))
    frozen = with_arguments(fn, {name: getattr(fn, name).detach() for name in names})
    vector = event_dim(fn, names[0]) == 1
    with torch.enable_grad():
        divergence = kl_divergence(frozen, other).sum()
        first = torch.autograd.grad(divergence, values, create_graph=True)
        parts = list(first[0].unbind(-1)) if vector else list(first)
        rows = []
        for part in parts:
            second = torch.autograd.grad(
                part.sum(), values, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(second[0] if vector else torch.stack(torch.broadcast_tensors(*second), -1))
    matrix = torch.stack(rows, -2).detach()
    if bool((matrix.diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise NotImplementedError("the support moves with the arguments: this is no information")
    return _as_information(names, matrix, vector)


def _from_scores(fn: Any, names: list[str]) -> tuple[Information, bool]:
    """The mean outer product of the scores: over a small support, which is exact, or samples."""
    _check_elementwise(fn, names)
    vector = event_dim(fn, names[0]) == 1
    support = _support(fn)
    with torch.no_grad():
        if support is None:
            points = fn.sample((SCORE_SAMPLES,))
            shape = (SCORE_SAMPLES, *fn.batch_shape)
            weights = torch.full(shape, 1 / SCORE_SAMPLES, device=points.device)
        else:
            points = support.expand(len(support), *fn.batch_shape, *fn.event_shape)
            weights = fn.log_prob(points).exp()
    values = [
        getattr(fn, name).detach().expand(len(points), *getattr(fn, name).shape).clone()
        for name in names
    ]
    values = [v.requires_grad_() for v in values]
    with torch.enable_grad():
        wide = with_arguments(fn, dict(zip(names, values, strict=True)))
        scores = torch.autograd.grad(wide.log_prob(points).sum(), values)
    score = scores[0] if vector else torch.stack(torch.broadcast_tensors(*scores), -1)
    score = torch.where(weights[..., None] > 0, score, torch.zeros_like(score))
    matrix = torch.einsum("s...,s...i,s...j->...ij", weights.to(score), score, score)
    return _as_information(names, matrix.detach(), vector), support is not None


def _support(fn: Any) -> Tensor | None:
    """All values, where they are few: (n, 1, ..., event)."""
    if not fn.has_enumerate_support:
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except NotImplementedError:  # unlike counts
        return None
    return support if len(support) <= SCORE_SAMPLES else None
