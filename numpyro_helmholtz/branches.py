"""Branches that stay branches under ``jax.vmap``.

With a batched predicate ``lax.cond`` becomes a select: both sides are computed for every member
of the batch. Where several seeds run side by side each step would then find every eigenbasis.
The members nearly always agree on the branch. So one predicate serves them all: the dearer
branch is taken where any member asks for it, and the others keep what is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Array = Any


def cond(predicate: Array, taken: Callable[[], Any], known: Any) -> Any:
    """``taken()`` where the predicate holds, else ``known``; computed where any member needs it.

    Args:
        predicate: a boolean. taken: gives a pytree as ``known``. known: a pytree of arrays.
    """

    def renewed() -> Any:
        return _chosen(predicate, taken(), known)

    return lax.cond(_largest(predicate), renewed, lambda: known)


def switch(index: Array, branches: Sequence[Callable[[Any], Any]], operand: Any) -> Any:
    """``branches[index](operand)``, for branches of which a later one serves as well.

    Args:
        index: an integer; under ``vmap`` the members' largest counts.
        branches: functions of the operand. operand: a pytree of arrays.
    """
    return lax.switch(_largest(index), branches, operand)


@custom_vmap
def _largest(value: Array) -> Array:
    """The value itself, and the largest of a batch."""
    return value


@_largest.def_vmap
def _largest_of_batch(size: int, batched: list[bool], value: Array) -> tuple[Array, bool]:
    del size, batched
    return _largest(value.max(0)), False


@custom_vmap
def _chosen(predicate: Array, new: Any, old: Any) -> Any:
    """The new values: this runs only where the predicate holds, or that of another member."""
    del predicate, old
    return new


@_chosen.def_vmap
def _chosen_of_batch(size: int, batched: list, *values: Any) -> tuple[Any, Any]:
    def select(predicate: Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(predicate, n, o), new, old)

    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    result = jax.vmap(select, axes, axis_size=size)(*values)
    return result, jax.tree.map(lambda _: True, result)
