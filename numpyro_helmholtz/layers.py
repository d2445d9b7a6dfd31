"""How parameters enter an argument of a site: affine, convolution, direct, or otherwise.

``find`` walks from the argument to its parameters. It ends in a *root*, a sum of terms that
are affine in the parameters (products, convolutions, biases); between argument and root stand
layout changes and elementwise links. At the root every element is a row and a unit, so its
derivative with respect to the unit's weights is that row of the features. Whatever does not
have this form is *opaque*: its Fisher block is matrix-free and exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import graph
from .columns import Columns
from .graph import Chain, Layout, Link, Node, Opaque
from .terms import PRODUCTS, Term, product

Array = Any


@dataclass(eq=False)
class Root:
    """A sum of affine terms, its features and the parameters of its units.

    Attributes:
        node: of the sum. terms: the primary one first.
        columns: one per term, in the order of the features' columns.
        row, unit: of each element of the root (flat).
        row_maps: for each term its row in each row of the root, or None for the same.
        num_rows: of the root.
    """

    node: Node
    terms: list[Term]
    columns: list[Columns] = field(default_factory=list)
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    unit: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    row_maps: list[np.ndarray | None] = field(default_factory=list)
    num_rows: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of the columns."""
        return tuple(t.leaf.leaf for t in self.terms)

    @property
    def what(self) -> str:
        """Kind of the application, for the report."""
        names = list(dict.fromkeys(t.what for t in self.terms if not t.direct))
        return " + ".join(names) if names else "direct"

    @property
    def feature_key(self) -> tuple:
        """Equal for roots with equal features."""
        maps = tuple(None if m is None else m.tobytes() for m in self.row_maps)
        return (self.num_rows, maps, tuple(t.feature_key for t in self.terms))

    def features(self) -> Array:
        """(rows, columns): the terms' features side by side, a one for a bias."""
        parts: list[Array] = []
        for term, row_map in zip(self.terms, self.row_maps, strict=True):
            if term.direct:
                like = parts[0] if parts else term.leaf.value
                parts.append(jnp.full((self.num_rows, 1), term.factor, dtype=like.dtype))
            else:
                value = term.features()
                parts.append(value if row_map is None else value[row_map])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)

    def coefficient(self, value: Array) -> Array:
        """The coefficient in the root's shape as (rows, units)."""
        primary = self.terms[0]
        return primary.coefficient(graph.pull(primary.chain, value))


@dataclass(eq=False)
class Application:
    """A site's argument as links over a root."""

    chain: Chain
    root: Root


def find(argument: Node) -> Application:
    """How parameters enter an argument of a site.

    Raises:
        Opaque: they enter in another way than as a sum of affine terms under links.
    """
    chain: list[Link] = []
    node = argument
    link: Link | None
    while True:
        link = graph.simple_link(node)
        if link is None:
            break
        chain.append(link)
        if isinstance(link, graph.Elementwise):
            chain += graph.widening(node.shape, link.foot)
        node = link.foot
    terms: list[Term] = []
    _collect(node, (), 1.0, terms)
    if len({t.leaf.leaf for t in terms}) != len(terms):
        raise Opaque("a parameter enters one argument twice")
    terms.sort(key=lambda t: (t.direct, -t.size))
    root = Root(node, terms)
    _index(root)
    return Application(tuple(chain), root)


def _collect(node: Node, chain: Chain, factor: Any, terms: list[Term]) -> None:
    """Append the affine terms below a node."""
    if node.leaf:
        terms.append(Term(node, chain, node, factor=factor))
        return
    assert node.equation is not None
    link = graph.layout_link(node)
    name, parents = node.kind, node.equation.parents()
    if link is not None:
        _collect(link.foot, (*chain, link), factor, terms)
    elif name in ("add", "add_any", "sub", "neg"):
        for slot, operand in parents:
            negative = name == "neg" or (name == "sub" and slot == 1)
            below = (*chain, *graph.widening(node.shape, operand))
            _collect(operand, below, -factor if negative else factor, terms)
    elif name in ("mul", "div") and len(parents) == 1 and _is_scaling(node, parents[0]):
        scale = jnp.reshape(node.equation.operands[1 - parents[0][0]], ())
        scale = factor * scale if name == "mul" else factor / scale
        below = (*chain, *graph.widening(node.shape, parents[0][1]))
        _collect(parents[0][1], below, scale, terms)
    elif name in PRODUCTS:
        terms.append(product(node, chain, factor))
    else:
        raise Opaque(f"a parameter passes through {name}")


def _is_scaling(node: Node, parent: tuple[int, Node]) -> bool:
    slot, _ = parent
    assert node.equation is not None
    return np.size(node.equation.operands[1 - slot]) == 1 and (node.kind == "mul" or slot == 0)


def _index(root: Root) -> None:
    """Fill in rows, units and columns."""
    primary = root.terms[0]
    index = graph.lift_index(primary.chain, primary.node.shape).reshape(-1)
    if primary.direct:
        if len(root.terms) > 1:
            raise Opaque("a sum of parameters")
        count = math.prod(primary.leaf.shape)
        root.row, root.unit = np.zeros_like(index), index
        root.num_rows, root.row_maps = 1, [None]
        root.columns = [Columns(primary.leaf.shape, None, False, (count, 1))]
        return
    row, unit = primary.rows_and_units(index)
    root.columns, root.row_maps = [primary.columns()], [None]
    units = root.columns[0].shape[0]
    rows = primary.size // units
    for term in root.terms[1:]:
        place = graph.lift_index(term.chain, term.node.shape).reshape(-1)
        if term.direct:
            table = _function(unit, place, units)
            if np.unique(table).size != units or units != term.size:
                raise Opaque("a bias is shared by several units")
            root.columns.append(Columns.of(term.leaf.shape, table[:, None]))
            root.row_maps.append(None)
            continue
        other_row, other_unit = term.rows_and_units(place)
        permutation = _function(unit, other_unit, units)
        if np.unique(permutation).size != units:
            raise Opaque("layers with unlike units add up")
        moved = term.columns().indices()[permutation]
        root.columns.append(Columns.of(term.leaf.shape, moved))
        row_map = _function(row, other_row, rows)
        same = np.array_equal(row_map, np.arange(rows)) and term.size // units == rows
        root.row_maps.append(None if same else row_map)
    root.row, root.unit, root.num_rows = row, unit, rows


def _function(of: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """The table with ``table[of] = value``; opaque where that is no function."""
    table = np.full(size, -1, dtype=np.int64)
    table[of] = value
    if (table[of] != value).any() or (table < 0).any():
        raise Opaque("terms of a sum with unlike rows or units")
    return table


__all__ = ["Application", "Layout", "Opaque", "Root", "find"]
