"""One affine term of a site's argument: a product, a convolution, or a parameter itself.

Seen from its output, every element of a term has a *row* (a datum, a particle, a position)
and a *unit* (a column of weights); its derivative by the unit's weights is that row of the
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import graph
from .columns import Columns
from .graph import Chain, Equation, Node, Opaque

Array = Any
PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclass(eq=False)
class Term:
    """One summand of a root.

    Attributes:
        node: of the summand. chain: from the root to it.
        leaf: the parameter. weight_chain: from the product's weight operand to the leaf.
        side: which operand is the weight. factor: constant factor of the summand.
    """

    node: Node
    chain: Chain
    leaf: Node
    weight_chain: Chain = ()
    side: int = 0
    factor: Any = 1.0

    @property
    def direct(self) -> bool:
        """Whether the parameter itself is the summand."""
        return self.node.kind not in PRODUCTS

    @property
    def what(self) -> str:
        """Kind of the application, for the report."""
        if self.direct:
            return "direct"
        if self.node.kind == "dot_general":
            return "affine"
        dilated = any(d != 1 for d in self._equation.params["lhs_dilation"])
        flipped = any(
            isinstance(k, graph.Layout) and k.equation.name == "rev" for k in self.weight_chain
        )
        return "transposed convolution" if dilated or flipped else "convolution"

    @property
    def _equation(self) -> Equation:
        assert self.node.equation is not None
        return self.node.equation

    @property
    def size(self) -> int:
        """Number of elements of the summand."""
        return math.prod(self.node.shape)

    @property
    def feature_key(self) -> tuple:
        """Equal for terms with equal features."""
        if self.direct:
            return ("one", str(self.factor))
        equation = self._equation
        params = tuple((k, str(equation.params[k])) for k in sorted(equation.params))
        source = id(equation.operands[1 - self.side])
        shape = np.shape(graph.value_of(equation.operands[self.side]))
        return (equation.name, params, source, self.side, shape, str(self.factor))

    # products ----------------------------------------------------------------------------------

    def _dims(self) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
        """Batch, free and contracted dimensions of the weight, then of the features."""
        contracting, batch = self._equation.params["dimension_numbers"]
        out: list[list[int]] = []
        for side in (self.side, 1 - self.side):
            ndim = np.ndim(graph.value_of(self._equation.operands[side]))
            c, b = list(contracting[side]), list(batch[side])
            out += [b, [d for d in range(ndim) if d not in c and d not in b], c]
        return tuple(out)  # type: ignore[return-value]

    def _counts(self) -> tuple[int, int, int]:
        """Sizes of the batch, of the weight's and of the features' free dimensions."""
        weight = np.shape(graph.value_of(self._equation.operands[self.side]))
        features = np.shape(graph.value_of(self._equation.operands[1 - self.side]))
        batch, free, _, _, other, _ = self._dims()
        return (
            math.prod(weight[d] for d in batch),
            math.prod(weight[d] for d in free),
            math.prod(features[d] for d in other),
        )

    def rows_and_units(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and unit of flat indices into the summand."""
        if self.node.kind == "conv_general_dilated":
            table = self._maps(np.arange(self.size).reshape(self.node.shape))
            place = np.empty(self.size, dtype=np.int64)
            place[table.reshape(-1)] = np.arange(self.size)
            units = table.shape[1]
            return place[index] // units, place[index] % units
        _, units, rows = self._counts()
        if self.side == 1:
            return index // units, index % units
        return index // (units * rows) * rows + index % rows, index // rows % units

    def coefficient(self, value: Array) -> Array:
        """The pulled coefficient (in the summand's shape) as (rows, units)."""
        if self.direct:
            return value.reshape(1, -1)
        if self.node.kind == "conv_general_dilated":
            return self._maps(value)
        batch, units, rows = self._counts()
        if self.side == 1:
            return value.reshape(-1, units)
        return jnp.swapaxes(value.reshape(batch, units, rows), 1, 2).reshape(-1, units)

    def features(self) -> Array:
        """The constant operand as (rows, columns)."""
        if self.node.kind == "conv_general_dilated":
            value = self._unfold()
        else:
            x = graph.value_of(self._equation.operands[1 - self.side])
            _, _, _, batch, free, contracted = self._dims()
            columns = math.prod(x.shape[d] for d in contracted)
            value = jnp.transpose(x, batch + free + contracted).reshape(-1, columns)
        value = value.astype(self.leaf.value.dtype)  # samples may be integers
        return value if isinstance(self.factor, float) and self.factor == 1 else value * self.factor

    def columns(self) -> Columns:
        """Where the leaf's elements stand in the (units, fan-in) matrix."""
        index = graph.lift_index(self.weight_chain, self.leaf.shape)
        if self.node.kind == "conv_general_dilated":
            table = self._kernel(index)
            return Columns.of(self.leaf.shape, table[:, self._order()])
        batch, free, contracted, *_ = self._dims()
        count, units, _ = self._counts()
        table = np.transpose(index, batch + free + contracted).reshape(count, units, -1)
        if not (table == table[:1]).all():
            raise Opaque("each batch element has weights of its own")
        return Columns.of(self.leaf.shape, table[0])

    # convolutions ------------------------------------------------------------------------------

    def _maps(self, value: Any) -> Any:
        """The summand of a convolution as (rows, units)."""
        spec = self._equation.params["dimension_numbers"].out_spec
        order = (spec[0], *spec[2:], spec[1])
        return value.transpose(order).reshape(-1, value.shape[spec[1]])

    def _kernel(self, value: Any) -> Any:
        """A kernel as (output channels, fan-in), the fan-in in the order (channel, position)."""
        spec = self._equation.params["dimension_numbers"].rhs_spec
        return value.transpose(spec).reshape(value.shape[spec[0]], -1)

    def _order(self) -> np.ndarray:
        """The order of the fan-in in which the leaf holds it."""
        table = self._kernel(graph.lift_index(self.weight_chain, self.leaf.shape))
        return np.argsort(table[0], kind="stable")

    def _unfold(self) -> Array:
        """Features of a convolution: the same convolution with an identity kernel."""
        spec = self._equation.params["dimension_numbers"].rhs_spec
        kernel = graph.value_of(self._equation.operands[1])
        shape = [kernel.shape[d] for d in spec[1:]]
        fan_in = math.prod(shape)
        eye = np.eye(fan_in)[self._order()].reshape(fan_in, *shape)
        eye = eye.transpose(np.argsort(spec))
        (out,) = self._equation.at({1: jnp.asarray(eye, kernel.dtype)})
        return self._maps(out)


def product(node: Node, chain: Chain, factor: Any) -> Term:
    """The term of a product of which one operand depends on parameters."""
    equation = node.equation
    assert equation is not None
    parents = equation.parents()
    if len(parents) > 1:
        raise Opaque("parameters before the last layer of the site")
    side, weight = parents[0]
    if equation.name == "conv_general_dilated":
        if side != 1:
            raise Opaque("parameters before the last layer of the site")
        if equation.params["feature_group_count"] != 1 or equation.params["batch_group_count"] != 1:
            raise Opaque("a convolution with groups")
    links = tuple(graph.walk_layout(weight))
    leaf = links[-1].foot if links else weight
    if not leaf.leaf:
        deeper = any(n.kind in PRODUCTS for n in _below(leaf))
        raise Opaque(
            "parameters before the last layer of the site"
            if deeper
            else f"a weight is computed by {leaf.kind}"
        )
    return Term(node, chain, leaf, links, side, factor)


def _below(node: Node) -> list[Node]:
    """A node and all nodes that it was made of."""
    found: dict[int, Node] = {}
    stack = [node]
    while stack:
        top = stack.pop()
        if top.order not in found:
            found[top.order] = top
            stack += [] if top.equation is None else [x for _, x in top.equation.parents()]
    return list(found.values())
