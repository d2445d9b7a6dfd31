"""The Fisher information of a distribution in its own arguments, and the registry of them.

``register_fisher(MyDistribution)`` decorates a function of one such distribution that returns
a dictionary. Its keys say which arguments, its values the information:

* ``"loc": tensor`` in the shape of the batch: each element informs about itself alone;
* ``"logits": tensor`` of shape ``(..., d, d)`` where the last dimension of the argument is none
  of the batch: it is one vector with this matrix;
* ``("concentration", "rate"): tensor`` of shape ``(..., d, d)``: ``d`` scalar arguments that
  are coupled element by element.

Two entries are orthogonal to each other. A distribution without a registered function gets
its information by differentiating its Kullback-Leibler divergence from itself twice, which is
exact; failing that, by Monte-Carlo scores, and the structure report says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.transforms import ComposeTransform, Transform

Information = dict[str | tuple[str, ...], Tensor]
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


def _logistic_variance(logits: Tensor) -> Tensor:
    """``σ(l) σ(-l)``."""
    p = logits.abs().neg_().sigmoid_()  # at most ½, so that 1 − p keeps its digits
    return p.addcmul_(p, p, value=-1)


def floored(x: Tensor) -> Tensor:
    """At least what is safe to divide by."""
    return x.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)


@register_fisher(torch.distributions.Bernoulli)
def _bernoulli(d: Any) -> Information:
    if d.__dict__.get("logits") is d._param:
        return {"logits": _logistic_variance(d.logits.detach())}
    probs = d.probs.detach()
    return {"probs": 1 / floored(probs * (1 - probs))}


@register_fisher(torch.distributions.Binomial)
def _binomial(d: Any) -> Information:
    count = d.total_count.detach()
    if "logits" in argument_names(d):
        return {"logits": count * _logistic_variance(d.logits.detach())}
    probs = d.probs.detach()
    return {"probs": count / floored(probs * (1 - probs))}


@register_fisher(torch.distributions.Normal)
def _normal(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    return {"loc": precision, "scale": 2 * precision}


@register_fisher(torch.distributions.Laplace)
def _laplace(d: Any) -> Information:
    precision = d.scale.detach() ** -2
    return {"loc": precision, "scale": precision}


@register_fisher(torch.distributions.Poisson)
def _poisson(d: Any) -> Information:
    return {"rate": 1 / d.rate.detach()}


@register_fisher(torch.distributions.Exponential)
def _exponential(d: Any) -> Information:
    return {"rate": d.rate.detach() ** -2}


@register_fisher(torch.distributions.Geometric)
def _geometric(d: Any) -> Information:
    probs = d.probs.detach()
    if "logits" in argument_names(d):
        return {"logits": 1 - probs}
    return {"probs": 1 / floored(probs**2 * (1 - probs))}


@register_fisher(torch.distributions.Categorical)
@register_fisher(torch.distributions.OneHotCategorical)
def _categorical(d: Any) -> Information:
    probs = d.probs.detach()
    if "logits" in argument_names(d):
        return {"logits": torch.diag_embed(probs) - probs[..., None] * probs[..., None, :]}
    return {"probs": torch.diag_embed(1 / floored(probs))}


@register_fisher(torch.distributions.Multinomial)
def _multinomial(d: Any) -> Information:
    return {name: d.total_count * value for name, value in _categorical(d).items()}


@register_fisher(torch.distributions.VonMises)
def _von_mises(d: Any) -> Information:
    kappa = d.concentration.detach()
    a = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    ratio = torch.where(kappa > 1e-4, a / kappa.clamp(min=1e-4), 0.5 - kappa**2 / 16)
    # The difference loses its digits where the series in 1/κ has them.
    large = kappa > (4 / torch.finfo(kappa.dtype).eps) ** (1 / 6)
    inverse = 1 / torch.where(large, kappa, 1.0)
    series = inverse**2 * (0.5 + inverse * (0.25 + inverse * (0.375 + inverse * 0.78125)))
    spread = torch.where(large, series, (1 - a**2 - ratio).clamp(min=0))
    return {"loc": kappa * a, "concentration": spread}


@register_fisher(torch.distributions.Gamma)
def _gamma(d: Any) -> Information:
    a, b = d.concentration.detach(), d.rate.detach()
    return {
        ("concentration", "rate"): matrix_of([[torch.polygamma(1, a), -1 / b], [-1 / b, a / b**2]])
    }


@register_fisher(torch.distributions.Beta)
def _beta(d: Any) -> Information:
    a, b = d.concentration1.detach(), d.concentration0.detach()
    both = torch.polygamma(1, a + b)
    return {
        ("concentration1", "concentration0"): matrix_of(
            [[torch.polygamma(1, a) - both, -both], [-both, torch.polygamma(1, b) - both]]
        )
    }


@register_fisher(torch.distributions.MultivariateNormal)
def _multivariate_normal(d: Any) -> Information:
    return {"loc": d.precision_matrix.detach()}


def matrix_of(rows: list[list[Tensor]]) -> Tensor:
    """Coupled arguments' information (..., d, d) of its entries, which may broadcast."""
    return torch.stack([torch.stack(torch.broadcast_tensors(*row), -1) for row in rows], -2)


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


def _has_rule(fn: Any) -> bool:
    return any(cls in _RULES for cls in type(fn).__mro__)


def unwrap(fn: Any) -> Base:
    """Take off Independent, masks, expansions and bijections.

    A fixed bijection changes neither the parameters nor their Fisher information. A transformed
    distribution that has a rule of its own stays whole.
    """
    transforms: list[Transform] = []
    masks: list[Any] = []
    while True:
        if isinstance(fn, torch.distributions.TransformedDistribution) and not _has_rule(fn):
            for transform in fn.transforms:
                transforms += (
                    transform.parts if isinstance(transform, ComposeTransform) else [transform]
                )
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
    found = _by_rule(fn, names)
    if found is not None:
        return found, True, "closed form"
    if not names:
        return {}, True, "no arguments"
    try:
        return _from_kl(fn, names), True, "second derivative of the KL divergence"
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return _from_scores(fn, names), False, f"Monte-Carlo scores ({SCORE_SAMPLES} samples)"


def _by_rule(fn: Any, names: list[str]) -> Information | None:
    """By the registered rule of its class, or of a base class with the same arguments."""
    for cls in fn.__class__.__mro__:
        if cls not in _RULES:
            continue
        found = _RULES[cls](fn)
        keys = {name for key in found for name in ([key] if isinstance(key, str) else key)}
        if found and keys <= set(names):
            return _shaped(fn, found)
        known = set(fn.arg_constraints)
        if cls is fn.__class__ and not keys <= known:
            raise ValueError(
                f"the rule of {cls.__name__} informs about {sorted(keys)}, but its arguments are "
                f"{sorted(known)}."
            )
    return None


def _shaped(fn: Any, found: Information) -> Information:
    """What a rule says, in the shape of the batch.

    Raises:
        ValueError: it has another shape than its arguments give it.
    """
    result: Information = {}
    for key, value in found.items():
        size: tuple[int, ...] = () if isinstance(key, str) else (len(key),) * 2
        if isinstance(key, str) and _is_vector(fn, key):
            size = tuple(getattr(fn, key).shape[-1:]) * 2
        expected, value = (*fn.batch_shape, *size), torch.as_tensor(value)
        try:
            result[key] = value if value.shape == expected else value.expand(expected)
        except RuntimeError:
            raise ValueError(
                f"the rule of {type(fn).__name__} gives {key!r} information of shape "
                f"{tuple(value.shape)}; with the batch {tuple(fn.batch_shape)} it has shape "
                f"{expected}."
            ) from None
    return result


def _is_vector(fn: Any, name: str) -> bool:
    """Whether the last dimension of an argument is one event, by its constraint or its shape."""
    return event_dim(fn, name) == 1 or getattr(fn, name).ndim > len(fn.batch_shape)


def event_dim(fn: Any, name: str) -> int:
    """Event dimensions of an argument; 0 where its constraint does not say."""
    try:
        return int(fn.arg_constraints[name].event_dim)
    except NotImplementedError:
        return 0


def argument_names(fn: Any) -> list[str]:
    """Arguments that the distribution was made with and that are floating-point tensors.

    Probabilities computed from logits (or the reverse) and kept are not among them.
    """
    if isinstance(fn, torch.distributions.Beta):
        return ["concentration1", "concentration0"]  # views of a Dirichlet's argument
    if isinstance(fn, dist.GammaPoisson):
        return ["concentration", "rate"]  # those of a Gamma
    held = getattr(fn, "_categorical", fn).__dict__
    given = held.get("_param")
    names = []
    for name in fn.arg_constraints:
        value = held.get(name)
        if name in ("probs", "logits") and given is not None and value is not given:
            continue
        if torch.is_tensor(value) and value.is_floating_point():
            names.append(name)
    return names


def inner_tensors(fn: Any) -> list[Tensor]:
    """Tensors of the distributions that one was made with, such as a mixture's components."""
    held = fn.__dict__
    found: list[Tensor] = []
    for name in _constructor_names(fn.__class__):
        for value in (held.get(name), held.get("_" + name)):
            if isinstance(value, torch.distributions.Distribution):
                found += _all_tensors(value)
    return found


def _all_tensors(fn: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(fn).values():
        if torch.is_tensor(value):
            found.append(value)
        elif isinstance(value, torch.distributions.Distribution):
            found += _all_tensors(value)
    return found


@functools.cache
def _constructor_names(cls: Any) -> tuple[str, ...]:
    """What a distribution's constructor takes, in order."""
    names = inspect.signature(cls.__init__).parameters
    return tuple(name for name in names if name not in ("self", "validate_args"))


def _fresh(fn: Any, values: dict[str, Tensor]) -> Any:
    """The distribution with other values of its arguments.

    Raises:
        NotImplementedError: its constructor does not take them again.
    """
    either = {"probs", "logits"} if values.keys() & {"probs", "logits"} else set()
    skipped = values.keys() | either
    taken = [name for name in _constructor_names(fn.__class__) if name not in skipped]
    others = {name: getattr(fn, name) for name in taken if hasattr(fn, name)}
    try:
        return type(fn)(**values, **others)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(fn).__name__} has no registered Fisher information, and it cannot be made "
            f"again from its arguments {list(values)} ({error}). Give one by @register_fisher."
        ) from error


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
        other = _fresh(fn, dict(zip(names, values, strict=True)))
    frozen = _fresh(fn, {name: getattr(fn, name).detach() for name in names})
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


def _from_scores(fn: Any, names: list[str]) -> Information:
    _check_elementwise(fn, names)
    vector = event_dim(fn, names[0]) == 1
    shape = (SCORE_SAMPLES,)
    with torch.no_grad():
        samples = fn.sample(shape)
    expanded = {
        name: getattr(fn, name).detach().expand(shape + getattr(fn, name).shape) for name in names
    }
    values = [v.clone().requires_grad_() for v in expanded.values()]
    with torch.enable_grad():
        wide = _fresh(fn, dict(zip(names, values, strict=True)))
        scores = torch.autograd.grad(wide.log_prob(samples).sum(), values)
    score = scores[0] if vector else torch.stack(torch.broadcast_tensors(*scores), -1)
    matrix = torch.einsum("s...i,s...j->...ij", score, score) / SCORE_SAMPLES
    return _as_information(names, matrix.detach(), vector)


def constant_transforms(transforms: list[Transform]) -> bool:
    """Whether no transform holds a tensor that requires a gradient."""
    return not any(
        torch.is_tensor(v) and v.requires_grad for t in transforms for v in vars(t).values()
    )
