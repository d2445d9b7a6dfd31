"""Remember how a graph was walked, so that the next step's graph need not be searched.

A program builds a new autograd graph in every step, nearly always of the same shape. A
``Route`` lists the nodes that a search has visited, with all of them that bears on what the
search finds. Where every node of another graph looks the same, the same is found there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import graph

Child = tuple[int, Any, int]
Hop = tuple[int, int, int, Tensor | None, tuple]


@dataclass
class Route:
    """The nodes that a search visited, each with the hop that led to it.

    Attributes:
        hops: number of the parent, slot and output number there, the leaf or None, fingerprint.
        once: the search saw more than the hops say, so the route serves no other graph.
    """

    hops: list[Hop] = field(default_factory=list)
    once: bool = False
    _numbers: dict[Any, int] = field(default_factory=dict)

    def start(self, argument: Tensor) -> tuple[Any, int]:
        """The argument's node and output number."""
        root = graph.root_of(argument)
        assert root is not None
        self._visit(0, 0, *root)
        return root

    def _visit(self, parent: int, slot: int, node: Any, nr: int) -> None:
        if node not in self._numbers:
            self._numbers[node] = len(self.hops)
            leaf = graph.leaf_of(node)
            print_ = () if leaf is not None else fingerprint(node, node.next_functions)
            self.hops.append((parent, slot, nr, leaf, print_))

    def children(self, node: Any, leaves: Mapping[int, str]) -> list[Child]:
        """The inputs of a visited node that depend on parameters; they are visited too."""
        below = list(graph.children(node, leaves))
        if len(below) != sum(child is not None for child, _ in node.next_functions):
            self.once = True
        for slot, child, nr in below:
            self._visit(self._numbers[node], slot, child, nr)
        return below

    def number(self, node: Any) -> int:
        """The number of a visited node."""
        return self._numbers[node]

    def close(self) -> None:
        """Let go of the nodes, and with them of the graph."""
        self._numbers = {}

    def follow(self, argument: Tensor) -> list[Any] | None:
        """The nodes of another argument's graph by number, or None where it looks otherwise."""
        root = graph.root_of(argument)
        if root is None:
            return None
        nodes: list[Any] = []
        below: list[tuple] = []  # the inputs of each, which the host lists anew when asked
        for parent, slot, nr, leaf, print_ in self.hops:
            node, found_nr = below[parent][slot] if nodes else root
            if node is None or found_nr != nr:
                return None
            inputs = () if leaf is not None else node.next_functions
            if leaf is not None:
                if graph.leaf_of(node) is not leaf:
                    return None
            elif fingerprint(node, inputs) != print_:
                return None
            nodes.append(node)
            below.append(inputs)
        return nodes


def fingerprint(node: Any, inputs: tuple) -> tuple:
    """What a search sees of a node: its name, shapes, kinds of inputs, every saved setting."""
    name = node.name()
    settings = _SETTINGS.get(name)
    if settings is None:
        settings = tuple(a for a in dir(node) if a.startswith("_saved_") and _matters(a))
        _SETTINGS[name] = settings
    return (
        name,
        list(map(_SHAPE, node._input_metadata)),
        list(map(type, map(_FIRST, inputs))),
        [_plain(getattr(node, attribute)) for attribute in settings] if settings else None,
        name.startswith(_SUMS) and graph.normalises(node),
    )


def _matters(attribute: str) -> bool:
    """Saved operands and results are read anew in every step; shapes along the way say sizes."""
    return attribute not in _OPERANDS and not attribute.endswith(("_sizes", "_strides"))


def _plain(value: Any) -> Any:
    """A setting as something to compare; a tensor, such as an index, equals nothing."""
    if type(value) is int or value is None:
        return value
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if any(torch.is_tensor(part) for part in parts):
        return object()
    return value if isinstance(value, (int, float, str, tuple, type(None))) else str(value)


_SHAPE, _FIRST = attrgetter("shape"), itemgetter(0)
_SETTINGS: dict[str, tuple[str, ...]] = {}
_SUMS = ("Sub", "Div")
_OPERANDS = frozenset(
    f"_saved_{name}"
    for name in "self other result mat1 mat2 input weight vec vec1 vec2 batch1 batch2 "
    "exponent".split()
)
