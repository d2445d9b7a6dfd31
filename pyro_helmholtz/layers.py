"""How parameters enter an argument of a site: affine, convolution, direct, or otherwise.

``find`` walks from the argument to its leaves. It ends in a *root*, a sum of terms that are
affine in the parameters (matrix products, convolutions, biases); between argument and root
stand layout changes and elementwise links. At the root every element is a row (a datum, a
particle, a position) and a unit (a column of weights), so its derivative with respect to the
unit's weights is that row of the features. Whatever does not have this form is *opaque*: its
Fisher block is matrix-free and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import graph, plans
from .columns import Opaque
from .graph import Chain, Link
from .plans import Plan
from .routes import Child, Route
from .terms import MATMUL, Term


@dataclass(slots=True)
class Root:
    """A sum of affine terms, its features and the parameters of its units.

    Attributes:
        node, nr: identity of the root. shape: of its value. terms: the primary one first.
        chain: from the root to the primary term. plan: rows, units and columns.
        names: the parameters, in the order of the columns. what: kind of the application, for
            the report.
    """

    node: Any
    nr: int
    shape: torch.Size
    terms: list[Term]
    chain: Chain
    plan: Plan
    names: list[str]
    what: str

    @property
    def key(self) -> tuple:
        """Identity of the root's node."""
        return (id(self.node), self.nr)

    def remap(self, f: Callable[[Any], Any]) -> Root:
        """The same root over other nodes."""
        return Root(
            f(self.node),
            self.nr,
            self.shape,
            [term.remap(f) for term in self.terms],
            graph.remap(self.chain, f),
            self.plan,
            self.names,
            self.what,
        )

    def features(self) -> Tensor:
        """(rows, columns): the terms' features side by side, a one for a bias."""
        return torch.cat(self.pieces(), 1)

    def pieces(self) -> list[Tensor]:
        """The terms' features, not yet side by side."""
        parts: list[Tensor] = []
        for term, row_map in zip(self.terms, self.plan.row_maps, strict=True):
            if term.direct:
                like = parts[0] if parts else term.leaf.detach()
                parts.append(like.new_full((self.plan.num_rows, 1), term.factor))
            else:
                value = term.features()
                parts.append(value if row_map is None else value[row_map])
        return parts

    def coefficient(self, value: Tensor) -> Tensor:
        """The coefficient in the root's shape as (rows, units)."""
        primary = self.terms[0]
        pulled = graph.pull(self.chain, value)
        if primary.direct:
            return pulled.reshape(1, -1)
        return primary.coefficient(pulled)


@dataclass(slots=True)
class Application:
    """A site's argument as links over a root."""

    chain: Chain
    root: Root

    def remap(self, f: Callable[[Any], Any]) -> Application:
        """The same application over other nodes."""
        return Application(graph.remap(self.chain, f), self.root.remap(f))


def find(
    argument: Tensor,
    leaves: Mapping[int, str],
    route: Route,
    *,
    vector: bool = False,
    shifts: bool = False,
) -> Application:
    """How the parameters in ``leaves`` enter an argument.

    Args:
        argument: an argument of a site's distribution that some parameter enters, its graph
            alive. leaves: id of each parameter's leaf to its name.
        route: takes down the way. vector: the last dimension is one vector, so that softmax
            and the like may mix it. shifts: ``a - logsumexp(a)`` of it changes nothing.

    Raises:
        Opaque: they enter in another way.
    """
    node, nr = route.start(argument)
    chain: list[Link] = []
    while True:
        name = graph.kind(node)
        below = route.children(node, leaves)
        if name in graph.LAYOUT:
            if not graph.changes_nothing(node, nr, below[0]):
                chain.append(_link(node, nr, below[0]))
        elif name in graph.ELEMENTWISE and len(below) == 1:
            chain.append(_link(node, nr, below[0], elementwise=True))
        elif vector and _at_head(chain) and graph.normalises(node) and name == "Sub":
            if not shifts:
                raise Opaque("a normalisation of log-probabilities")
            chain.append(_plain(node, nr, below[0]))
        elif vector and _at_head(chain) and graph.mixing(node) is not None:
            chain.append(replace(_plain(node, nr, below[0]), mixes=True))
        elif name == "Stack":
            route.once = True
            below = _stacked(node, tuple(chain), torch.Size(argument.shape), below)
            chain.append(_unstack(node, nr, below[0]))
        else:
            break
        _, node, nr = below[0]
    terms = list(_Sum(leaves, route).collect(node, nr, (), 1.0))
    if len({id(t.leaf) for t in terms}) != len(terms):
        raise Opaque("a parameter enters one argument twice")
    terms.sort(key=lambda t: (t.direct, -t.out_shape().numel()))
    shape = graph.shape_of(node, nr)
    kinds = dict.fromkeys(t.what for t in terms if not t.direct)
    root = Root(
        node,
        nr,
        shape,
        terms,
        terms[0].chain,
        plans.make(terms, shape),
        names=[t.name for t in terms],
        what=" + ".join(kinds) if kinds else "direct",
    )
    return Application(tuple(chain), root)


def _at_head(chain: list[Link]) -> bool:
    return all(link.mixes or graph.kind(link.node) in ("Expand", "Sub") for link in chain)


def _link(node: Any, nr: int, child: Child, *, elementwise: bool = False) -> Link:
    slot, below, below_nr = child
    return Link(node, nr, slot, graph.shape_of(below, below_nr), elementwise)


def _plain(node: Any, nr: int, child: Child) -> Link:
    """A link that only sums over broadcast dimensions (the slot of a sum)."""
    slot, below, below_nr = child
    return Link(node, nr, slot, graph.shape_of(below, below_nr), special=lambda value: value)


def _stacked(node: Any, chain: Chain, head: torch.Size, below: list[Child]) -> list[Child]:
    """The one input of a stack that the head of a chain was taken from."""
    shape = graph.shape_of(node)
    index = graph.lift_index(chain, shape, head, node._input_metadata[0].device)
    place = index // shape[_stack_dim(node) + 1 :].numel() % shape[_stack_dim(node)]
    slots = place.unique().tolist()
    found = [child for child in below if [child[0]] == slots]
    if not found:
        raise Opaque("several stacked tensors in one argument")
    return found


def _unstack(node: Any, nr: int, child: Child) -> Link:
    slot, below, below_nr = child
    dim = _stack_dim(node)
    shape = graph.shape_of(below, below_nr)
    return Link(node, nr, slot, shape, special=lambda value: value.select(dim, slot))


def _stack_dim(node: Any) -> int:
    return graph.signed(node._saved_dim) % len(graph.shape_of(node))


def _constant(node: Any, below: list[Child]) -> float:
    """The number that a node multiplies by or divides by."""
    value = getattr(node, "_saved_other" if below[0][0] == 0 else "_saved_self")
    if len(below) != 1 or not torch.is_tensor(value) or value.ndim:
        raise Opaque(f"a parameter passes through {node.name()}")
    return float(value)


@dataclass
class _Sum:
    """Collects the affine terms below a node."""

    leaves: Mapping[int, str]
    route: Route

    def collect(self, node: Any, nr: int, chain: Chain, factor: float) -> Iterator[Term]:
        """The terms below a node, each times the constant ``factor``."""
        leaf = graph.leaf_of(node)
        if leaf is not None:
            own = self.leaves[id(leaf)]
            yield Term(graph.kind(node), node, chain, (), leaf, own, factor=factor)
            return
        name = graph.kind(node)
        below = self.route.children(node, self.leaves)
        if name in graph.LAYOUT:
            link = _link(node, nr, below[0])
            yield from self.collect(*below[0][1:], (*chain, link), factor)
        elif name in ("Add", "Sub"):
            sign = -1.0 if name == "Sub" else 1.0
            for child in below:
                scale = factor * (sign * float(node._saved_alpha) if child[0] == 1 else 1.0)
                link = _plain(node, nr, child)
                yield from self.collect(*child[1:], (*chain, link), scale)
        elif name == "Neg":
            link = _plain(node, nr, below[0])
            yield from self.collect(*below[0][1:], (*chain, link), -factor)
        elif name == "Mul" or (name == "Div" and below[0][0] == 0):
            constant = _constant(node, below)
            self.route.once = True  # its value is no part of the route
            link = _plain(node, nr, below[0])
            scale = 1 / constant if name == "Div" else constant
            yield from self.collect(*below[0][1:], (*chain, link), factor * scale)
        elif name in MATMUL:
            yield from self._product(node, nr, name, chain, factor, below)
        elif name == "Convolution":
            yield from self._convolution(node, nr, chain, factor, below)
        else:
            raise Opaque(f"a parameter passes through {node.name()}")

    def _product(
        self, node: Any, nr: int, name: str, chain: Chain, factor: float, below: list[Child]
    ) -> Iterator[Term]:
        first = 1 if name in ("Addmm", "Baddbmm", "Addbmm", "Addmv") else 0
        if first and (float(node._saved_alpha) != 1.0 or float(node._saved_beta) != 1.0):
            raise Opaque(f"{node.name()} with alpha or beta other than 1")
        if name == "Addbmm":
            raise Opaque("addbmm")
        operands = [child for child in below if child[0] >= first]
        if len(operands) > 1:
            raise Opaque("parameters before the last layer of the site")
        for slot, weight, weight_nr in operands:
            if name in ("Mv", "Addmv") and slot != first:
                raise Opaque("a parameter as the vector of a product")
            weight_chain, leaf = self._to_leaf(weight, weight_nr)
            own = self.leaves[id(leaf)]
            yield Term(name, node, chain, weight_chain, leaf, own, slot - first, factor)
        for child in below:
            if child[0] < first:
                link = _plain(node, nr, child)
                yield from self.collect(*child[1:], (*chain, link), factor)

    def _convolution(
        self, node: Any, nr: int, chain: Chain, factor: float, below: list[Child]
    ) -> Iterator[Term]:
        if int(node._saved_groups) != 1:
            raise Opaque("a convolution with groups")
        for slot, child, child_nr in below:
            if slot == 0:
                raise Opaque("parameters before the last layer of the site")
            if slot == 1:
                weight_chain, leaf = self._to_leaf(child, child_nr)
                own = self.leaves[id(leaf)]
                yield Term("Convolution", node, chain, weight_chain, leaf, own, 0, factor)
                continue
            rest = [d for d in range(len(graph.shape_of(node))) if d != 1]
            shape = graph.shape_of(child, child_nr)
            link = Link(node, nr, slot, shape, special=partial(torch.sum, dim=rest))
            yield from self.collect(child, child_nr, (*chain, link), factor)

    def _to_leaf(self, node: Any, nr: int) -> tuple[Chain, Tensor]:
        chain: list[Link] = []
        while graph.leaf_of(node) is None:
            if graph.kind(node) not in graph.LAYOUT:
                raise Opaque(f"a weight is computed by {node.name()}")
            child = self.route.children(node, self.leaves)[0]
            chain.append(_link(node, nr, child))
            _, node, nr = child
        leaf = graph.leaf_of(node)
        assert leaf is not None
        return tuple(chain), leaf
