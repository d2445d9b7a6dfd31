"""Links of a chain: operations in which every element depends on exactly one element.

A link leads from a node to something that it was made of: by rearranging it (reshape,
broadcast, slice, …) or by elementwise functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .record import Array, Equation, Node

LAYOUT = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims slice rev split gather "
    "dynamic_slice convert_element_type copy copy_p reduce_precision sharding_constraint".split()
)


@dataclass(eq=False)
class Layout:
    """A link that rearranges: from a node to its operand in ``slot``."""

    node: Node
    slot: int

    @property
    def equation(self) -> Equation:
        """The equation of the link."""
        assert self.node.equation is not None
        return self.node.equation

    @property
    def foot(self) -> Node:
        """The operand."""
        return self.equation.operands[self.slot]

    def forward(self, value: Array) -> Array:
        """The layout's map on other values of the operand."""
        if self.equation.name == "convert_element_type":
            return value
        return self.equation.at({self.slot: value})[self.node.output]

    def index(self, value: np.ndarray) -> np.ndarray:
        """``forward`` on an array of indices."""
        quick = _INDEX_MAPS.get(self.equation.name)
        if quick is not None:
            return quick(value, self.equation.params, self.node.output)
        others = [x for i, x in enumerate(self.equation.operands) if i != self.slot]
        if any(isinstance(x, (Node, jax.core.Tracer)) for x in others):
            raise Opaque(f"an index of {self.equation.name} is no constant")
        with jax.ensure_compile_time_eval():
            return np.asarray(self.forward(jnp.asarray(value)))

    def pull(self, coefficient: Array) -> Array:
        """Rearrange back, and sum over broadcast dimensions."""
        like = jax.ShapeDtypeStruct(self.foot.shape, coefficient.dtype)
        (result,) = jax.linear_transpose(self.forward, like)(coefficient)
        return result


@dataclass(eq=False)
class Broadcast:
    """A link from a shape to a node that was broadcast to it without an equation."""

    shape: tuple[int, ...]
    foot: Node

    def forward(self, value: Array) -> Array:
        """The broadcast of other values of the foot."""
        return jnp.broadcast_to(value, self.shape)

    def index(self, value: np.ndarray) -> np.ndarray:
        """``forward`` on an array of indices."""
        return np.broadcast_to(value, self.shape)

    def pull(self, coefficient: Array) -> Array:
        """Sum over the broadcast dimensions."""
        foot = self.foot.shape
        own = (1,) * (len(self.shape) - len(foot)) + foot
        axes = tuple(i for i, (n, m) in enumerate(zip(self.shape, own, strict=True)) if n != m)
        return coefficient.sum(axes, keepdims=True).reshape(foot)


@dataclass(eq=False)
class Elementwise:
    """A link through elementwise functions: ``inside`` lead from the head to one foot.

    A foot of another shape is broadcast to the head's; a ``Broadcast`` follows the link.
    """

    inside: list[Node]
    foot: Node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the head."""
        return self.inside[0].shape

    def function(self, value: Array) -> Array:
        """The head as a function of the foot."""
        values = {self.foot.order: value}
        for node in sorted(self.inside, key=lambda n: n.order):
            assert node.equation is not None
            replaced = {
                slot: values[x.order] for slot, x in node.equation.parents() if x.order in values
            }
            values[node.order] = node.equation.at(replaced)[node.output]
        return values[max(values)]

    def slope(self) -> Array:
        """``g'``, in the shape of the head."""
        value = jnp.broadcast_to(self.foot.value, self.shape)
        return jax.jvp(self.function, (value,), (jnp.ones_like(value),))[1]


class Rowwise(Elementwise):
    """A link through functions of the last dimension: vectors of vectors."""

    def jacobian(self) -> Array:
        """The derivative of each vector of the head by the foot's, (..., d, d)."""
        value = self.foot.value

        def push(direction: Array) -> Array:
            tangent = jnp.broadcast_to(direction, value.shape)
            return jax.jvp(self.function, (value,), (tangent,))[1]

        eye = jnp.eye(value.shape[-1], dtype=value.dtype)
        return jax.vmap(push, out_axes=-1)(eye)


Link = Layout | Broadcast | Elementwise
Chain = tuple[Link, ...]


class Opaque(Exception):
    """The argument is not a sum of affine terms; the message says why."""


def layout_link(node: Node) -> Layout | None:
    """The link of a node that rearranges one operand, or None."""
    if node.equation is None or node.equation.name not in LAYOUT:
        return None
    parents = node.equation.parents()
    return Layout(node, parents[0][0]) if len(parents) == 1 else None


def region(node: Node, allowed: Callable[[Node], bool]) -> Elementwise | None:
    """The nodes from ``node`` down to the first one that all its ways lead through."""
    frontier = {node.order: node}
    inside: list[Node] = []
    while True:
        top = frontier.pop(max(frontier))
        if inside and not frontier:
            return Elementwise(inside, top)
        if top.equation is None or not allowed(top):
            return None
        inside.append(top)
        frontier |= {x.order: x for _, x in top.equation.parents()}


def elementwise_link(node: Node) -> Elementwise | None:
    """The link through elementwise functions of one node, or None."""
    return region(node, lambda inner: inner.elementwise and inner.shape == node.shape)


def simple_link(node: Node) -> Layout | Elementwise | None:
    """The layout or elementwise link of a node, or None."""
    return layout_link(node) or elementwise_link(node)


def rowwise_link(node: Node) -> Rowwise | None:
    """The link through functions of the last dimension alone, such as a softmax, or None."""
    found = region(node, lambda inner: _stays_in_rows(inner, node.shape))
    if found is None or found.foot.shape != node.shape:
        return None
    return Rowwise(found.inside, found.foot)


def _stays_in_rows(node: Node, full: tuple[int, ...]) -> bool:
    rows, last = full[:-1], len(full) - 1
    assert node.equation is not None
    params, shape = node.equation.params, node.shape
    if not full or shape not in (full, (*rows, 1), rows):
        return False
    operands = [x.shape for _, x in node.equation.parents()]
    if node.elementwise:
        return all(x in (shape, (*rows, 1)) for x in operands)
    if node.kind in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
        return operands == [full] and tuple(params["axes"]) == (last,)
    if node.kind == "broadcast_in_dim":
        return tuple(params["broadcast_dimensions"]) == tuple(range(len(operands[0])))
    return node.kind in ("reshape", "squeeze", "expand_dims") and operands[0] != full


def widening(shape: tuple[int, ...], foot: Node) -> Chain:
    """The link that broadcasts a foot to ``shape``, if one is needed."""
    return () if foot.shape == shape else (Broadcast(shape, foot),)


def _broadcast(value: np.ndarray, params: dict, _: int) -> np.ndarray:
    shape = params["shape"]
    wide = [1] * len(shape)
    for axis, size in zip(params["broadcast_dimensions"], value.shape, strict=True):
        wide[axis] = size
    return np.broadcast_to(value.reshape(wide), shape)


def _slice(value: np.ndarray, params: dict, _: int) -> np.ndarray:
    strides = params["strides"] or (1,) * value.ndim
    return value[
        tuple(
            slice(a, b, s)
            for a, b, s in zip(
                params["start_indices"], params["limit_indices"], strides, strict=True
            )
        )
    ]


_INDEX_MAPS: dict[str, Callable[[np.ndarray, dict, int], np.ndarray]] = {
    "reshape": lambda value, params, _: value.reshape(params["new_sizes"]),
    "transpose": lambda value, params, _: value.transpose(params["permutation"]),
    "broadcast_in_dim": _broadcast,
    "squeeze": lambda value, params, _: np.squeeze(value, tuple(params["dimensions"])),
    "expand_dims": lambda value, params, _: np.expand_dims(value, tuple(params["dimensions"])),
    "slice": _slice,
    "rev": lambda value, params, _: np.flip(value, tuple(params["dimensions"])),
    "split": lambda value, params, output: np.split(
        value, np.cumsum(params["sizes"])[:-1], params["axis"]
    )[output],
    "convert_element_type": lambda value, params, _: value,
    "copy": lambda value, params, _: value,
    "copy_p": lambda value, params, _: value,
    "reduce_precision": lambda value, params, _: value,
    "sharding_constraint": lambda value, params, _: value,
}
