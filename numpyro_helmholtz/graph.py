"""Chains of links: pull coefficients down them, lift indices up them.

A *chain* leads from a node to something that it was made of, through operations in which
every output element depends on exactly one input element (``links``). Two maps run along it:

* ``pull(c)`` carries the Fisher coefficient of the output to the input: layout links
  rearrange it and sum over broadcast dimensions, an elementwise ``g`` multiplies it by ``g'²``.
* ``lift_index`` says, for each output element, on which input element it depends.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from .links import (
    Broadcast,
    Chain,
    Elementwise,
    Layout,
    Link,
    Opaque,
    layout_link,
    rowwise_link,
    simple_link,
    widening,
)
from .record import Array, Equation, Node, record, value_of


def pull(chain: Chain, coefficient: Array) -> Array:
    """Carry a coefficient from the head of the chain to its foot."""
    for link in chain:
        if isinstance(link, Elementwise):
            coefficient = coefficient * jnp.square(link.slope())
        else:
            coefficient = link.pull(coefficient)
    return coefficient


def lift_slopes(chain: Chain) -> Array | None:
    """The derivative of each element of the head by the foot's; None where it is one."""
    slopes = None
    for link in reversed(chain):
        if isinstance(link, Elementwise):
            slopes = link.slope() if slopes is None else slopes * link.slope()
        elif slopes is not None:
            slopes = link.forward(slopes)
    return slopes


def lift_index(chain: Chain, foot: tuple[int, ...]) -> np.ndarray:
    """For each element of the head, the flat index of the foot element it depends on."""
    index = np.arange(int(np.prod(foot))).reshape(foot)
    for link in reversed(chain):
        if not isinstance(link, Elementwise):
            index = link.index(index)
    return index


def walk_layout(node: Node) -> Iterator[Layout]:
    """The layout links below a node."""
    link = layout_link(node)
    while link is not None:
        yield link
        link = layout_link(link.foot)


__all__ = [
    "Broadcast",
    "Chain",
    "Elementwise",
    "Equation",
    "Layout",
    "Link",
    "Node",
    "Opaque",
    "layout_link",
    "lift_index",
    "lift_slopes",
    "pull",
    "record",
    "rowwise_link",
    "simple_link",
    "value_of",
    "walk_layout",
    "widening",
]
