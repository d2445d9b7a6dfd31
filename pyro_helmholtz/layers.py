"""How parameters enter an argument of a site: affine, convolution, direct, or otherwise.

``find`` walks from the argument to its leaves. It ends in a *root*, a sum of terms that are
affine in the parameters (matrix products, convolutions, biases); between argument and root
stand layout changes and elementwise links. At the root every element is a row (a datum, a
particle, a position) and a unit (a column of weights), so its derivative with respect to the
unit's weights is that row of the features. Whatever does not have this form is *opaque*: its
Fisher block is matrix-free and exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import graph
from .graph import Chain, Link

MATMUL = {"Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv"}


class Opaque(Exception):
    """The argument is not a sum of affine terms; the message says why."""


@dataclass
class Columns:
    """How a parameter's elements fill the (units, columns) matrix.

    Attributes:
        leaf_shape: of the parameter. index: flat index of the leaf's element in each place,
            or None where the leaf is this matrix reshaped. transposed: it is its transpose.
        shape: (units, columns).
    """

    leaf_shape: torch.Size
    index: Tensor | None
    transposed: bool
    shape: tuple[int, int]

    @classmethod
    def of(cls, leaf: Tensor, index: Tensor) -> Columns:
        """From the flat index of the leaf in each (unit, column)."""
        units, columns = index.shape
        flat = torch.arange(index.numel(), device=index.device)
        shape = (units, columns)
        if index.numel() == leaf.numel():
            if torch.equal(index.reshape(-1), flat):
                return cls(leaf.shape, None, False, shape)
            if torch.equal(index.t().reshape(-1), flat):
                return cls(leaf.shape, None, True, shape)
        if index.numel() != index.unique().numel() or index.numel() != leaf.numel():
            raise Opaque("a weight is used at several places of one layer")
        return cls(leaf.shape, index, False, shape)

    def to_units(self, value: Tensor) -> Tensor:
        """A tensor in the leaf's shape as (units, columns)."""
        if self.index is not None:
            return value.reshape(-1)[self.index]
        if self.transposed:
            return value.reshape(self.shape[1], self.shape[0]).t()
        return value.reshape(self.shape)

    def to_leaf(self, value: Tensor) -> Tensor:
        """The inverse of ``to_units``."""
        if self.index is not None:
            flat = torch.empty(self.leaf_shape.numel(), dtype=value.dtype, device=value.device)
            flat[self.index.reshape(-1)] = value.reshape(-1)
            return flat.reshape(self.leaf_shape)
        if self.transposed:
            return value.t().reshape(self.leaf_shape)
        return value.reshape(self.leaf_shape)


@dataclass
class Term:
    """One summand of a root.

    Attributes:
        node: its autograd node. chain: from the root to the node's output.
        weight: chain from the node's weight operand to the leaf, and the leaf.
        side: which operand is the weight (0 or 1). factor: constant factor.
    """

    node: Any
    chain: Chain
    weight_chain: Chain
    leaf: Tensor
    side: int = 0
    factor: float = 1.0

    @property
    def kind(self) -> str:
        """The operation."""
        return graph.kind(self.node)

    @property
    def direct(self) -> bool:
        """Whether the leaf itself is the summand."""
        return self.kind not in MATMUL and self.kind != "Convolution"

    @property
    def what(self) -> str:
        """Kind of the application, for the report."""
        if self.direct:
            return "direct"
        if self.kind != "Convolution":
            return "affine"
        return "transposed convolution" if self.node._saved_transposed else "convolution"

    def out_shape(self) -> torch.Size:
        """Shape of the term's own output."""
        if self.direct:
            return self.leaf.shape
        return graph.shape_of(self.node)

    def rows_and_units(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row and unit of flat indices into the node's output."""
        shape = self.out_shape()
        if self.kind == "Convolution":
            positions = shape[2:].numel()
            return (index // (shape[1] * positions)) * positions + index % positions, (
                index // positions
            ) % shape[1]
        if self.kind in ("Mv", "Addmv"):
            return torch.zeros_like(index), index
        if len(shape) == 2:
            first, second = index // shape[1], index % shape[1]
            return (first, second) if self.side == 1 else (second, first)
        batch, first, second = (
            index // (shape[1] * shape[2]),
            (index // shape[2]) % shape[1],
            index % shape[2],
        )
        if self.side == 1:
            return batch * shape[1] + first, second
        return batch * shape[2] + second, first

    def coefficient(self, value: Tensor) -> Tensor:
        """The pulled coefficient (in the node's output shape) as (rows, units)."""
        if self.kind == "Convolution":
            return value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1])
        if value.ndim == 1:
            return value[None, :]
        if value.ndim == 2:
            return value if self.side == 1 else value.t()
        moved = value if self.side == 1 else value.transpose(1, 2)
        return moved.reshape(-1, moved.shape[-1])

    def features(self) -> Tensor:
        """The constant operand as (rows, columns), in the order of the weight's fan-in."""
        name, node = self.kind, self.node
        if name == "Convolution":
            value = _unfold(node)
        elif name in ("Mv", "Addmv"):
            value = node._saved_vec[None, :]
        else:
            if name == "Addmm":
                operands = ("_saved_mat2", "_saved_mat1")
            elif name == "Baddbmm":
                operands = ("_saved_batch2", "_saved_batch1")
            else:
                operands = ("_saved_mat2", "_saved_self")
            value = getattr(node, operands[self.side])
            if self.side == 0:
                value = value.transpose(-1, -2)
            value = value.reshape(-1, value.shape[-1])
        value = value.detach()
        return value if self.factor == 1.0 else value * self.factor

    def columns(self) -> Columns:
        """Where the leaf's elements stand in the (units, fan-in) matrix."""
        if self.direct:
            raise AssertionError("direct terms have no columns of their own")
        device = self.leaf.device
        head = _weight_shape(self)
        index = graph.lift_index(self.weight_chain, self.leaf.shape, head, device)
        if self.kind == "Convolution":
            if self.node._saved_transposed:
                index = index.transpose(0, 1)
            return Columns.of(self.leaf, index.reshape(index.shape[0], -1))
        if index.ndim == 3:
            if not bool((index == index[:1]).all()):
                raise Opaque("each batch element has weights of its own")
            index = index[0]
        return Columns.of(self.leaf, index if self.side == 0 else index.t())


def _weight_shape(term: Term) -> torch.Size:
    if term.weight_chain:
        link = term.weight_chain[0]
        return graph.shape_of(link.node, link.nr)
    return term.leaf.shape


def _unfold(node: Any) -> Tensor:
    """Features of a convolution: the same convolution with an identity kernel."""
    x, w = node._saved_input.detach(), node._saved_weight.detach()
    transposed = bool(node._saved_transposed)
    kernel = w.shape[2:]
    channels = w.shape[0] if transposed else w.shape[1]
    fan_in = channels * kernel.numel()
    eye = torch.eye(fan_in, dtype=x.dtype, device=x.device).reshape(fan_in, channels, *kernel)
    if transposed:
        eye = eye.transpose(0, 1)
    out = torch.ops.aten.convolution(
        x,
        eye,
        None,
        list(node._saved_stride),
        list(node._saved_padding),
        list(node._saved_dilation),
        transposed,
        list(node._saved_output_padding),
        1,
    )
    return out.flatten(2).transpose(1, 2).reshape(-1, fan_in)


@dataclass
class Root:
    """A sum of affine terms, its features and the parameters of its units.

    Attributes:
        node, nr: identity of the root. shape: of its value. terms: the primary one first.
        columns: one per term with a leaf, in the order of the features' columns.
        row, unit: of each element of the root (flat).
    """

    node: Any
    nr: int
    shape: torch.Size
    terms: list[Term]
    signature: tuple
    columns: list[Columns] = field(default_factory=list)
    row: Tensor | None = None
    unit: Tensor | None = None
    row_maps: list[Tensor | None] = field(default_factory=list)
    num_rows: int = 1
    num_units: int = 1

    @property
    def key(self) -> tuple:
        """Identity of the root's node."""
        return (id(self.node), self.nr)

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters, in the order of the columns."""
        return [t.leaf for t in self.terms]

    @property
    def what(self) -> str:
        """Kind of the application, for the report."""
        names = list(dict.fromkeys(t.what for t in self.terms if not t.direct))
        return " + ".join(names) if names else "direct"

    def features(self) -> Tensor:
        """(rows, columns): the terms' features side by side, a one for a bias."""
        parts: list[Tensor] = []
        for term, row_map in zip(self.terms, self.row_maps, strict=True):
            if term.direct:
                like = parts[0] if parts else term.leaf
                parts.append(
                    torch.full(
                        (self.num_rows, 1), term.factor, dtype=like.dtype, device=like.device
                    )
                )
            else:
                value = term.features()
                parts.append(value if row_map is None else value[row_map])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def coefficient(self, value: Tensor) -> Tensor:
        """The coefficient in the root's shape as (rows, units)."""
        primary = self.terms[0]
        pulled = graph.pull(primary.chain, value)
        if primary.direct:
            return pulled.reshape(1, -1)
        return primary.coefficient(pulled)


@dataclass
class Application:
    """A site's argument as links over a root."""

    chain: Chain
    root: Root


_PLANS: dict[tuple, tuple] = {}


def find(
    argument: Tensor, leaves: Mapping[int, str], *, shifts: bool = False
) -> Application | None:
    """How the parameters in ``leaves`` enter an argument.

    Args:
        argument: an argument of a site's distribution, its graph alive.
        leaves: id of each parameter's leaf to its name.
        shifts: step over the normalisation ``a - logsumexp(a)`` of the last dimension.

    Returns:
        The application, or None where no parameter enters.

    Raises:
        Opaque: they enter in another way.
    """
    start = graph.root_of(argument)
    if start is None or not any(key in leaves for key in graph.leaves_below(start)):
        return None
    node, nr = start
    chain: list[Link] = []
    while True:
        name = graph.kind(node)
        below = list(graph.children(node, leaves))
        if name in graph.LAYOUT:
            chain.append(_link(node, nr, below[0]))
        elif name in graph.ELEMENTWISE and len(below) == 1:
            chain.append(_link(node, nr, below[0], elementwise=True))
        elif shifts and _normalises(node) and all(graph.kind(k.node) == "Expand" for k in chain):
            chain.append(_plain(node, nr, below[0]))
            shifts = False
        elif name == "Stack":
            below = _stacked(node, tuple(chain), torch.Size(argument.shape), below)
            chain.append(_unstack(node, nr, below[0]))
        else:
            break
        _, node, nr = below[0]
    root = _root(node, nr, leaves)
    return Application(tuple(chain), root)


def _link(node: Any, nr: int, child: tuple[int, Any, int], *, elementwise: bool = False) -> Link:
    slot, below, below_nr = child
    return Link(node, nr, slot, graph.shape_of(below, below_nr), elementwise)


def _normalises(node: Any) -> bool:
    """Whether a node is ``a - logsumexp(a, -1)``, as torch makes it of logits."""
    if graph.kind(node) != "Sub":
        return False
    first, second = (child for child, _ in node.next_functions)
    if first is None or second is None or graph.kind(second) != "Logsumexp":
        return False
    last = len(graph.shape_of(node)) - 1
    dims = [int(d) - (1 << 64 if int(d) >= 1 << 63 else 0) for d in second._saved_dim]
    return second.next_functions[0][0] is first and dims in ([-1], [last])


def _stacked(
    node: Any, chain: Chain, head: torch.Size, below: list[tuple[int, Any, int]]
) -> list[tuple[int, Any, int]]:
    """The one input of a stack that the head of a chain was taken from."""
    shape = graph.shape_of(node)
    index = graph.lift_index(chain, shape, head, node._input_metadata[0].device)
    place = index // shape[_stack_dim(node) + 1 :].numel() % shape[_stack_dim(node)]
    slots = place.unique().tolist()
    found = [child for child in below if [child[0]] == slots]
    if not found:
        raise Opaque("several stacked tensors in one argument")
    return found


def _unstack(node: Any, nr: int, child: tuple[int, Any, int]) -> Link:
    slot, below, below_nr = child
    dim = _stack_dim(node)
    shape = graph.shape_of(below, below_nr)
    return Link(node, nr, slot, shape, special=lambda value: value.select(dim, slot))


def _stack_dim(node: Any) -> int:
    dim, ndim = int(node._saved_dim), len(graph.shape_of(node))
    dim -= 1 << 64 if dim >= 1 << 63 else 0
    return dim % ndim


def _root(node: Any, nr: int, leaves: Mapping[int, str]) -> Root:
    terms: list[Term] = []
    seen: list[tuple] = []
    _collect(node, nr, (), 1.0, leaves, terms, seen)
    if len({id(t.leaf) for t in terms}) != len(terms):
        raise Opaque("a parameter enters one argument twice")
    terms.sort(key=lambda t: (t.direct, -t.out_shape().numel()))
    root = Root(node, nr, graph.shape_of(node, nr), terms, tuple(seen))
    _index(root)
    return root


def _collect(
    node: Any,
    nr: int,
    chain: Chain,
    factor: float,
    leaves: Mapping[int, str],
    terms: list[Term],
    seen: list[tuple],
) -> None:
    """Append the affine terms below a node."""
    leaf = graph.leaf_of(node)
    if leaf is not None:
        seen.append((tuple(leaf.shape), str(leaf.device)))
        terms.append(Term(node, chain, (), leaf, factor=factor))
        return
    seen.append((*graph.signature(node), nr))
    name = graph.kind(node)
    below = list(graph.children(node, leaves))
    if name in graph.LAYOUT:
        link = _link(node, nr, below[0])
        _collect(below[0][1], below[0][2], (*chain, link), factor, leaves, terms, seen)
    elif name in ("Add", "Sub"):
        sign = -1.0 if name == "Sub" else 1.0
        for child in below:
            scale = factor * (sign * float(node._saved_alpha) if child[0] == 1 else 1.0)
            link = _plain(node, nr, child)
            _collect(child[1], child[2], (*chain, link), scale, leaves, terms, seen)
    elif name == "Neg":
        link = _plain(node, nr, below[0])
        _collect(below[0][1], below[0][2], (*chain, link), -factor, leaves, terms, seen)
    elif name in MATMUL or name == "Convolution":
        _collect_product(node, nr, name, chain, factor, leaves, terms, seen, below)
    else:
        raise Opaque(f"a parameter passes through {node.name()}")


def _plain(node: Any, nr: int, child: tuple[int, Any, int]) -> Link:
    """A link that only sums over broadcast dimensions (the slot of a sum)."""
    slot, below, below_nr = child
    return Link(node, nr, slot, graph.shape_of(below, below_nr), special=lambda value: value)


def _collect_product(
    node: Any,
    nr: int,
    name: str,
    chain: Chain,
    factor: float,
    leaves: Mapping[int, str],
    terms: list[Term],
    seen: list[tuple],
    below: list[tuple[int, Any, int]],
) -> None:
    has_bias = name in ("Addmm", "Baddbmm", "Addbmm", "Addmv")
    bias_slot = 2 if name == "Convolution" else (0 if has_bias else None)
    operands = [child for child in below if child[0] != bias_slot]
    bias = [child for child in below if child[0] == bias_slot]
    if has_bias and (float(node._saved_alpha) != 1.0 or float(node._saved_beta) != 1.0):
        raise Opaque(f"{node.name()} with alpha or beta other than 1")
    if name == "Convolution" and int(node._saved_groups) != 1:
        raise Opaque("a convolution with groups")
    if name == "Addbmm":
        raise Opaque("addbmm")
    if len(operands) > 1:
        raise Opaque("parameters before the last layer of the site")
    if operands:
        slot, below_node, below_nr = operands[0]
        first = 1 if has_bias else 0
        if name == "Convolution" and slot != 1:
            raise Opaque("parameters before the last layer of the site")
        side = slot - first
        if name in ("Mv", "Addmv") and side != 0:
            raise Opaque("a parameter as the vector of a product")
        weight_chain, leaf = _to_leaf(below_node, below_nr, leaves, seen)
        if name == "Convolution":
            side = 0
        terms.append(Term(node, chain, weight_chain, leaf, side, factor))
    for child in bias:
        if name == "Convolution":
            slot, below_node, below_nr = child
            rest = [d for d in range(len(graph.shape_of(node))) if d != 1]
            link = Link(
                node,
                nr,
                slot,
                graph.shape_of(below_node, below_nr),
                special=partial(torch.sum, dim=rest),
            )
        else:
            link = _plain(node, nr, child)
        _collect(child[1], child[2], (*chain, link), factor, leaves, terms, seen)


def _to_leaf(
    node: Any, nr: int, leaves: Mapping[int, str], seen: list[tuple]
) -> tuple[Chain, Tensor]:
    chain: list[Link] = []
    while graph.leaf_of(node) is None:
        if graph.kind(node) not in graph.LAYOUT:
            raise Opaque(f"a weight is computed by {node.name()}")
        seen.append((*graph.signature(node), nr))
        child = next(iter(graph.children(node, leaves)))
        chain.append(_link(node, nr, child))
        _, node, nr = child
    leaf = graph.leaf_of(node)
    assert leaf is not None
    seen.append((tuple(leaf.shape), str(leaf.device)))
    return tuple(chain), leaf


def _index(root: Root) -> None:
    """Fill in rows, units and columns, from the cache where the same graph came before."""
    key = (root.signature, tuple((t.side, t.factor, t.what) for t in root.terms))
    if key not in _PLANS:
        _PLANS[key] = _plan(root)
    row, unit, rows, units, row_maps, columns = _PLANS[key]
    if isinstance(row, str):
        raise Opaque(row)
    root.row, root.unit, root.num_rows, root.num_units = row, unit, rows, units
    root.row_maps = row_maps
    root.columns = columns


def _plan(root: Root) -> tuple:
    try:
        return _make_plan(root)
    except Opaque as reason:
        return (str(reason), None, 0, 0, [], [])


def _make_plan(root: Root) -> tuple:
    device = root.terms[0].leaf.device
    primary = root.terms[0]

    def index_of(term: Term) -> Tensor:
        return graph.lift_index(term.chain, term.out_shape(), root.shape, device).reshape(-1)

    if primary.direct:
        if len(root.terms) > 1:
            raise Opaque("a sum of parameters")
        unit = index_of(primary)
        count = primary.leaf.numel()
        columns = [Columns(primary.leaf.shape, None, False, (count, 1))]
        return (torch.zeros_like(unit), unit, 1, count, [None], columns)

    row, unit = primary.rows_and_units(index_of(primary))
    columns = [primary.columns()]
    units = columns[0].shape[0]
    rows = int(primary.out_shape().numel() // units)
    row_maps: list[Tensor | None] = [None]
    for term in root.terms[1:]:
        if term.direct:
            place = _function(unit, index_of(term), units)
            if place.unique().numel() != units or units != term.leaf.numel():
                raise Opaque("a bias is shared by several units")
            columns.append(Columns.of(term.leaf, place[:, None]))
            row_maps.append(None)
            continue
        other_row, other_unit = term.rows_and_units(index_of(term))
        permutation = _function(unit, other_unit, units)
        if permutation.unique().numel() != units:
            raise Opaque("layers with unlike units add up")
        own = term.columns()
        moved = _as_index(own, device)[permutation]
        columns.append(Columns.of(term.leaf, moved))
        row_map = _function(row, other_row, rows)
        same = torch.equal(row_map, torch.arange(rows, device=device))
        same = same and int(term.out_shape().numel() // units) == rows
        row_maps.append(None if same else row_map)
    return (row, unit, rows, units, row_maps, columns)


def _as_index(columns: Columns, device: torch.device) -> Tensor:
    flat = torch.arange(columns.leaf_shape.numel(), device=device)
    return columns.to_units(flat.reshape(columns.leaf_shape))


def _function(of: Tensor, value: Tensor, size: int) -> Tensor:
    """The table with ``table[of] = value``; opaque where that is no function."""
    table = torch.full((size,), -1, dtype=torch.long, device=of.device)
    table[of] = value
    if not torch.equal(table[of], value) or bool((table < 0).any()):
        raise Opaque("terms of a sum with unlike rows or units")
    return table
