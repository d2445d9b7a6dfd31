"""Split a computation: its products now, what follows them later, inside a branch.

What a branch of ``lax.cond`` closes over is computed whether the branch is taken or not. What is
computed inside is not, but then XLA does not see that it has the same value as something outside.
So products, which the gradient needs anyway, are computed outside, and what follows them inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


def later(fn: Callable[[], Any]) -> Callable[[], Any]:
    """Compute the products of ``fn()``; what is returned computes the rest.

    Args:
        fn: gives a pytree of arrays.

    Returns:
        A function of no arguments with the result of ``fn``. It can be called more than once.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)()
    jaxpr = closed.jaxpr
    wanted: set[Any] = set()
    first, rest = [], []
    for eqn in reversed(jaxpr.eqns):
        if _is_dear(eqn) or any(v in wanted for v in eqn.outvars):
            first.append(eqn)
            wanted |= _inputs(eqn.invars)
        else:
            rest.append(eqn)
    needed = set().union(_inputs(jaxpr.outvars), *(_inputs(eqn.invars) for eqn in rest))
    made = [v for eqn in first for v in eqn.outvars if v in needed]
    head = jaxpr.replace(eqns=first[::-1], outvars=made)
    known = [v for v in jaxpr.constvars if v in needed]
    tail = jaxpr.replace(constvars=[], invars=[*made, *known], eqns=rest[::-1])
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values = [*jaxpr_as_fun(ClosedJaxpr(head, closed.consts))(), *(consts[v] for v in known)]
    structure = jax.tree.structure(shapes)

    def finish() -> Any:
        return jax.tree.unflatten(structure, jaxpr_as_fun(ClosedJaxpr(tail, ()))(*values))

    return finish


def _inputs(variables: Any) -> set[Any]:
    return {v for v in variables if not isinstance(v, Literal)}


def _is_dear(eqn: Any) -> bool:
    """Whether an equation is a product, or has one inside."""
    if eqn.primitive.name in PRODUCTS:
        return True
    inner = [x for value in eqn.params.values() for x in _listed(value)]
    jaxprs = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in inner]
    return any(_is_dear(e) for j in jaxprs if isinstance(j, Jaxpr) for e in j.eqns)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
