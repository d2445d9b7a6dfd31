"""The Fisher information of a distribution in its own arguments, and the registry of them.

``register_fisher(MyDistribution)`` decorates a function of one such distribution that returns
a dictionary. Its keys say which arguments, its values the information:

* ``"loc": array`` in the shape of the batch: each element informs about itself alone;
* ``"logits": array`` of shape ``(..., d, d)`` where the last dimension of the argument is none
  of the batch: it is one vector with this matrix;
* ``("concentration", "rate"): array`` of shape ``(..., d, d)``: ``d`` scalar arguments that
  are coupled element by element.

Two entries are orthogonal to each other. A distribution without a registered function gets
its information by differentiating its Kullback-Leibler divergence from itself twice, which is
exact; failing that, by Monte-Carlo scores, and the structure report says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import i0e, i1e, polygamma
from numpyro.distributions import kl_divergence
from numpyro.distributions.transforms import ComposeTransform

Array = Any
Information = dict[str | tuple[str, ...], Array]
Rule = Callable[[Any], Information]
R = TypeVar("R", bound=Rule)
_RULES: dict[type, Rule] = {}
SCORE_SAMPLES = 512


def register_fisher(distribution: type) -> Callable[[R], R]:
    """Register the Fisher information of a distribution's arguments.

    Args:
        distribution: the class; subclasses with the same arguments inherit the rule.

    Returns:
        A decorator for a function ``rule(d) -> information`` (see the module's text).

    Raises:
        TypeError: ``distribution`` is not a class.
    """
    if not isinstance(distribution, type):
        raise TypeError(f"register_fisher needs a distribution class, got {distribution!r}.")

    def decorate(rule: R) -> R:
        _RULES[distribution] = rule
        return rule

    return decorate


def _logistic_variance(logits: Array) -> Array:
    """``σ(l) σ(-l)``, by one exponential that cannot overflow."""
    e = jnp.exp(-jnp.abs(logits))
    return e / jnp.square(1 + e)


def tiny(x: Any) -> float:
    """A floor that is safe to divide by."""
    return float(jnp.finfo(jnp.result_type(x, float)).tiny) ** 0.5


@register_fisher(dist.BernoulliLogits)
def _bernoulli_logits(d: Any) -> Information:
    return {"logits": _logistic_variance(d.logits)}


@register_fisher(dist.BernoulliProbs)
def _bernoulli_probs(d: Any) -> Information:
    return {"probs": 1 / jnp.maximum(d.probs * (1 - d.probs), tiny(d.probs))}


@register_fisher(dist.BinomialLogits)
def _binomial_logits(d: Any) -> Information:
    return {"logits": d.total_count * _logistic_variance(d.logits)}


@register_fisher(dist.BinomialProbs)
def _binomial_probs(d: Any) -> Information:
    return {"probs": d.total_count / jnp.maximum(d.probs * (1 - d.probs), tiny(d.probs))}


@register_fisher(dist.Normal)
def _normal(d: Any) -> Information:
    precision = d.scale**-2.0
    return {"loc": precision, "scale": 2 * precision}


@register_fisher(dist.Laplace)
def _laplace(d: Any) -> Information:
    precision = d.scale**-2.0
    return {"loc": precision, "scale": precision}


@register_fisher(dist.Poisson)
def _poisson(d: Any) -> Information:
    return {"rate": 1 / d.rate}


@register_fisher(dist.Exponential)
def _exponential(d: Any) -> Information:
    return {"rate": d.rate**-2.0}


@register_fisher(dist.GeometricLogits)
def _geometric_logits(d: Any) -> Information:
    return {"logits": jax.nn.sigmoid(-d.logits)}


@register_fisher(dist.GeometricProbs)
def _geometric_probs(d: Any) -> Information:
    return {"probs": 1 / jnp.maximum(d.probs**2 * (1 - d.probs), tiny(d.probs))}


def _simplex_logits(logits: Array) -> Array:
    probs = jax.nn.softmax(logits, -1)
    return _diagonal(probs) - probs[..., None] * probs[..., None, :]


def _simplex_probs(probs: Array) -> Array:
    return _diagonal(1 / jnp.maximum(probs, tiny(probs)))


@register_fisher(dist.CategoricalLogits)
def _categorical_logits(d: Any) -> Information:
    return {"logits": _simplex_logits(d.logits)}


@register_fisher(dist.CategoricalProbs)
def _categorical_probs(d: Any) -> Information:
    return {"probs": _simplex_probs(d.probs)}


@register_fisher(dist.MultinomialLogits)
def _multinomial_logits(d: Any) -> Information:
    count = jnp.asarray(d.total_count)[..., None, None]
    return {"logits": count * _simplex_logits(d.logits)}


@register_fisher(dist.MultinomialProbs)
def _multinomial_probs(d: Any) -> Information:
    count = jnp.asarray(d.total_count)[..., None, None]
    return {"probs": count * _simplex_probs(d.probs)}


@register_fisher(dist.VonMises)
def _von_mises(d: Any) -> Information:
    kappa = jnp.asarray(d.concentration, jnp.result_type(d.concentration, float))
    a = i1e(kappa) / i0e(kappa)
    small, large = kappa <= 1e-4, kappa > (4 / jnp.finfo(kappa.dtype).eps) ** (1 / 6)
    ratio = jnp.where(small, 0.5 - kappa**2 / 16, a / jnp.where(small, 1.0, kappa))
    # The difference loses its digits where the series in 1/κ has them.
    inverse = 1 / jnp.where(large, kappa, 1.0)
    series = inverse**2 * (0.5 + inverse * (0.25 + inverse * (0.375 + inverse * 0.78125)))
    spread = jnp.where(large, series, jnp.maximum(1 - a**2 - ratio, 0))
    return {"loc": kappa * a, "concentration": spread}


@register_fisher(dist.Gamma)
def _gamma(d: Any) -> Information:
    a, b = d.concentration, d.rate
    return {("concentration", "rate"): matrix_of([[polygamma(1, a), -1 / b], [-1 / b, a / b**2]])}


@register_fisher(dist.Beta)
def _beta(d: Any) -> Information:
    a, b = d.concentration1, d.concentration0
    both = polygamma(1, a + b)
    return {
        ("concentration1", "concentration0"): matrix_of(
            [[polygamma(1, a) - both, -both], [-both, polygamma(1, b) - both]]
        )
    }


@register_fisher(dist.MultivariateNormal)
def _multivariate_normal(d: Any) -> Information:
    return {"loc": d.precision_matrix}


def _diagonal(x: Array) -> Array:
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def matrix_of(rows: list[list[Array]]) -> Array:
    """Coupled arguments' information (..., d, d) of its entries, which may broadcast."""
    return jnp.stack([jnp.stack(jnp.broadcast_arrays(*row), -1) for row in rows], -2)


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


def _has_rule(fn: Any) -> bool:
    return any(cls in _RULES for cls in type(fn).__mro__)


def unwrap(fn: Any) -> Base:
    """Take off Independent, masks, expansions and bijections.

    A fixed bijection changes neither the parameters nor their Fisher information. A transformed
    distribution that has a rule of its own stays whole.
    """
    transforms: list[Any] = []
    masks: list[Any] = []
    while True:
        if isinstance(fn, dist.TransformedDistribution) and not _has_rule(fn):
            for transform in fn.transforms:
                composed = isinstance(transform, ComposeTransform)
                transforms += transform.parts if composed else [transform]
            fn = fn.base_dist
        elif isinstance(fn, dist.MaskedDistribution):
            masks.append(fn._mask)
            fn = fn.base_dist
        elif isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
        else:
            return Base(fn, transforms, masks)


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
    registered = _by_rule(fn)
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
        found = _from_scores(fn, names, rng_key)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(fn).__name__} has no registered Fisher information, and it cannot be made "
            f"and sampled again from its arguments {names} ({error}). Give one by "
            "@register_fisher."
        ) from error
    return _constant(found), False, f"Monte-Carlo scores ({SCORE_SAMPLES} samples)"


def _by_rule(fn: Any) -> Information | None:
    """By the registered rule of its class, or of a base class with the same arguments."""
    names = set(fn.arg_constraints)
    for cls in type(fn).__mro__:
        if cls not in _RULES:
            continue
        found = _RULES[cls](fn)
        keys = {name for key in found for name in ([key] if isinstance(key, str) else key)}
        if keys <= names:
            return _shaped(fn, found)
        if cls is type(fn):
            raise ValueError(
                f"the rule of {cls.__name__} informs about {sorted(keys)}, but its arguments are "
                f"{sorted(names)}."
            )
    return None


def _shaped(fn: Any, found: Information) -> Information:
    """What a rule says; matrices in the shape of the batch.

    Raises:
        ValueError: it has another shape than its arguments give it.
    """
    result: Information = {}
    for key, value in found.items():
        size: tuple[int, ...] = () if isinstance(key, str) else (len(key),) * 2
        if isinstance(key, str) and is_vector(fn, key):
            size = jnp.shape(getattr(fn, key))[-1:] * 2
        expected = (*fn.batch_shape, *size)
        try:
            wide = jnp.broadcast_to(value, expected)
        except ValueError:
            raise ValueError(
                f"the rule of {type(fn).__name__} gives {key!r} information of shape "
                f"{jnp.shape(value)}; with the batch {tuple(fn.batch_shape)} it has shape "
                f"{expected}."
            ) from None
        result[key] = wide if size else value
    return result


def _constant(info: Information) -> Information:
    return {key: lax.stop_gradient(jnp.asarray(value)) for key, value in info.items()}


def argument_names(fn: Any) -> list[str]:
    """Arguments that the distribution was made with and that are floating-point arrays."""
    found = []
    for name in fn.arg_constraints:
        value = fn.__dict__.get(name)
        if name == "mean" and isinstance(fn, dist.NegativeBinomial2):
            value = fn.mean  # kept as a rate
        if value is not None and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            found.append(name)
    return found


def arguments(fn: Any, names: list[str]) -> dict[str, Array]:
    """The arguments by name, as arrays."""
    return {name: jnp.asarray(getattr(fn, name)) for name in names}


def _check_elementwise(fn: Any, names: list[str]) -> None:
    for name in names:
        event = _event_dim(fn, name)
        if event > 1 or (event == 1 and len(names) > 1):
            raise NotImplementedError(
                f"{type(fn).__name__} has no registered Fisher information: its argument "
                f"{name!r} is a matrix or mixes vectors with scalars. Give one by "
                "@register_fisher."
            )


def is_vector(fn: Any, name: str) -> bool:
    """Whether the last dimension of an argument is one event, by its constraint or its shape."""
    return _event_dim(fn, name) == 1 or jnp.ndim(getattr(fn, name)) > len(fn.batch_shape)


def _event_dim(fn: Any, name: str) -> int:
    """Event dimensions of an argument; 0 where its constraint does not say."""
    try:
        return int(fn.arg_constraints[name].event_dim)
    except NotImplementedError:
        return 0


def other_values(fn: Any, names: list[str]) -> dict[str, Any]:
    """What else the distribution was made with, such as a count or another distribution.

    Args:
        fn: the distribution. names: the arguments that are left out.
    """
    taken = set(inspect.signature(type(fn).__init__).parameters) | set(fn.arg_constraints)
    found: dict[str, Any] = {}
    for name in sorted(taken - {*names, "self", "validate_args"}):
        for own in (name, f"_{name}"):
            if own in fn.__dict__:
                found.setdefault(name, fn.__dict__[own])
    return found


def _as_information(names: list[str], matrix: Array, vector: bool) -> Information:
    if vector:
        return {names[0]: matrix}
    if len(names) == 1:
        return {names[0]: matrix[..., 0, 0]}
    return {tuple(names): matrix}


def _with(fn: Any, values: dict[str, Array]) -> Any:
    """The same distribution with other values of some arguments."""
    return type(fn)(**values, **other_values(fn, list(values)), validate_args=False)


def _from_kl(fn: Any, names: list[str]) -> Information:
    """The second derivative of ``KL(fn, other)`` by the arguments of the other, at ``fn``."""
    vector = _event_dim(fn, names[0]) == 1
    values = [lax.stop_gradient(v) for v in arguments(fn, names).values()]
    if not vector:
        values = jnp.broadcast_arrays(*values)
    frozen = _with(fn, dict(zip(names, values, strict=True)))

    def slope(at: list[Array]) -> list[Array]:
        def divergence(moved: list[Array]) -> Array:
            return kl_divergence(frozen, _with(fn, dict(zip(names, moved, strict=True)))).sum()

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


def _from_scores(fn: Any, names: list[str], rng_key: Array | None) -> Information:
    """The mean outer product of the scores of samples."""
    vector = _event_dim(fn, names[0]) == 1
    key = jax.random.PRNGKey(0) if rng_key is None else rng_key
    values = [lax.stop_gradient(v) for v in arguments(fn, names).values()]
    if not vector:
        values = jnp.broadcast_arrays(*values)
    fixed = _with(fn, dict(zip(names, values, strict=True)))
    samples = lax.stop_gradient(fixed.sample(key, (SCORE_SAMPLES,)))
    wide = [jnp.broadcast_to(v, (SCORE_SAMPLES, *v.shape)) for v in values]

    def total(at: list[Array]) -> Array:
        return _with(fn, dict(zip(names, at, strict=True))).log_prob(samples).sum()

    scores = jax.grad(total)(wide)
    score = scores[0] if vector else jnp.stack(scores, -1)
    matrix = jnp.einsum("s...i,s...j->...ij", score, score) / SCORE_SAMPLES
    return _as_information(names, matrix, vector)
