"""The Fisher information of any distribution in its own arguments.

A distribution without a registered function gets its information by differentiating its
Kullback-Leibler divergence from itself twice, which is exact; failing that, from its scores at
all values where these are few, else at samples, and the structure report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import kl_divergence
from numpyro.distributions.transforms import AbsTransform, ComposeTransform

from .arguments import argument_names, arguments, event_dim, with_arguments
from .registry import Array, Information, by_rule, has_rule

SCORE_SAMPLES = 512


@dataclass
class Base:
    """A distribution without its wrappers.

    Attributes:
        fn: the innermost distribution.
        transforms: the bijections taken off; the information does not cover their parameters.
        masks: masks taken off.
    """

    fn: Any
    transforms: list[Any]
    masks: list[Any]


def unwrap(fn: Any) -> Base:
    """Take off Independent, masks, expansions and bijections.

    A fixed bijection changes neither the parameters nor their Fisher information. A transformed
    distribution stays whole if it has a rule of its own, or if values are lost (their sign).
    """
    transforms: list[Any] = []
    masks: list[Any] = []
    while True:
        if isinstance(fn, dist.TransformedDistribution) and not has_rule(fn):
            parts = _parts(fn.transforms)
            if any(isinstance(transform, AbsTransform) for transform in parts):
                return Base(fn, transforms + parts, masks)
            transforms += parts
            fn = fn.base_dist
        elif isinstance(fn, dist.MaskedDistribution):
            masks.append(fn._mask)
            fn = fn.base_dist
        elif isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
        else:
            return Base(fn, transforms, masks)


def _parts(transforms: list[Any]) -> list[Any]:
    parts: list[Any] = []
    for transform in transforms:
        parts += transform.parts if isinstance(transform, ComposeTransform) else [transform]
    return parts


def information(fn: Any, rng_key: Array | None = None) -> tuple[Information, bool, str]:
    """The Fisher information of an unwrapped distribution, a constant of its arguments.

    Args:
        fn: the distribution. rng_key: for Monte-Carlo scores.

    Returns:
        The information, whether it is exact, and how it was found.

    Raises:
        NotImplementedError: there is no rule for it, and it cannot be made again from its
            arguments.
        ValueError: its own rule is about other arguments than it has, or of another shape.
    """
    registered = by_rule(fn)
    if registered is not None:
        return _constant(registered), True, "closed form"
    names = argument_names(fn)
    if not names:
        return {}, True, "no arguments"
    _check_elementwise(fn, names)
    try:
        return _constant(_from_kl(fn, names)), True, "second derivative of the KL divergence"
    except (NotImplementedError, TypeError, ValueError):
        pass
    try:
        found, exact = _from_scores(fn, names, rng_key)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(fn).__name__} has no registered Fisher information, and it cannot be made "
            f"and sampled again from its arguments {names} ({error}). Give one by "
            "@register_fisher."
        ) from error
    how = "sum over the support" if exact else f"Monte-Carlo scores ({SCORE_SAMPLES} samples)"
    return _constant(found), exact, how


def _constant(info: Information) -> Information:
    return {key: lax.stop_gradient(jnp.asarray(value)) for key, value in info.items()}


def _check_elementwise(fn: Any, names: list[str]) -> None:
    for name in names:
        event = event_dim(fn, name)
        if event > 1 or (event == 1 and len(names) > 1):
            raise NotImplementedError(
                f"{type(fn).__name__} has no registered Fisher information: its argument "
                f"{name!r} is a matrix or mixes vectors with scalars. Give one by "
                "@register_fisher."
            )


def _as_information(names: list[str], matrix: Array, vector: bool) -> Information:
    if vector:
        return {names[0]: matrix}
    if len(names) == 1:
        return {names[0]: matrix[..., 0, 0]}
    return {tuple(names): matrix}


def _from_kl(fn: Any, names: list[str]) -> Information:
    """The second derivative of ``KL(fn, other)`` by the arguments of the other, at ``fn``."""
    vector = event_dim(fn, names[0]) == 1
    values = [lax.stop_gradient(v) for v in arguments(fn, names).values()]
    if not vector:
        values = jnp.broadcast_arrays(*values)
    frozen = with_arguments(fn, dict(zip(names, values, strict=True)))

    def slope(at: list[Array]) -> list[Array]:
        def divergence(moved: list[Array]) -> Array:
            other = with_arguments(fn, dict(zip(names, moved, strict=True)))
            return kl_divergence(frozen, other).sum()

        return jax.grad(divergence)(at)

    if vector:
        eye = jnp.eye(values[0].shape[-1], dtype=values[0].dtype)
        directions = [[jnp.broadcast_to(e, values[0].shape)] for e in eye]
    else:
        count = range(len(values))
        directions = [[jnp.full_like(v, i == k) for k, v in enumerate(values)] for i in count]
    moved = [jax.jvp(slope, (values,), (direction,))[1] for direction in directions]
    columns = [m[0] if vector else jnp.stack(m, -1) for m in moved]
    return _as_information(names, jnp.stack(columns, -1), vector)


def _from_scores(fn: Any, names: list[str], rng_key: Array | None) -> tuple[Information, bool]:
    """The mean outer product of the scores: over a small support, which is exact, or samples."""
    vector = event_dim(fn, names[0]) == 1
    key = jax.random.PRNGKey(0) if rng_key is None else rng_key
    values = [lax.stop_gradient(v) for v in arguments(fn, names).values()]
    if not vector:
        values = jnp.broadcast_arrays(*values)
    fixed = with_arguments(fn, dict(zip(names, values, strict=True)))
    support = _support(fixed)
    if support is None:
        points = lax.stop_gradient(fixed.sample(key, (SCORE_SAMPLES,)))
        weights = jnp.full((SCORE_SAMPLES, *fixed.batch_shape), 1 / SCORE_SAMPLES)
    else:
        points = jnp.broadcast_to(support, (len(support), *fixed.shape()))
        weights = jnp.exp(fixed.log_prob(points))
    wide = [jnp.broadcast_to(v, (len(points), *v.shape)) for v in values]

    def total(at: list[Array]) -> Array:
        return with_arguments(fn, dict(zip(names, at, strict=True))).log_prob(points).sum()

    scores = jax.grad(total)(wide)
    score = scores[0] if vector else jnp.stack(scores, -1)
    score = jnp.where(weights[..., None] > 0, score, 0)
    matrix = jnp.einsum("s...,s...i,s...j->...ij", weights.astype(score.dtype), score, score)
    return _as_information(names, matrix, vector), support is not None


def _support(fn: Any) -> Array | None:
    """All values, where they are few and do not depend on the data: (n, 1, ..., event)."""
    if not fn.has_enumerate_support:
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, TypeError):  # unlike counts, or known only when it runs
        return None
    return support if len(support) <= SCORE_SAMPLES else None
