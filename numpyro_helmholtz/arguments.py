"""Arguments of programs as a pytree.

What is an array travels as a leaf, under ``jit`` and ``lax.scan``; what is not (names, flags,
the structure) is static.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["places", "others", "structure"],
)
@dataclass(frozen=True)
class Arguments:
    """A tree of arguments, its arrays apart from the rest.

    An object that stands in several places is one leaf, and is one object again in
    ``rebuilt``: the pairing of dreams with arguments goes by identity.

    Attributes:
        arrays: the distinct arrays. places: for each leaf of the tree the number of its
            array, or -1. others: the leaves that are no arrays. structure: of the tree.
    """

    arrays: tuple[Any, ...]
    places: tuple[int, ...]
    others: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> Arguments:
        """Take a tree apart."""
        leaves, structure = jax.tree.flatten(tree)
        arrays: list[Any] = []
        numbers: dict[int, int] = {}
        places, others = [], []
        for leaf in leaves:
            if not isinstance(leaf, jax.Array | np.ndarray):
                places.append(-1)
                others.append(leaf)
                continue
            if id(leaf) not in numbers:
                numbers[id(leaf)] = len(arrays)
                arrays.append(leaf)
            places.append(numbers[id(leaf)])
        return cls(tuple(arrays), tuple(places), tuple(others), structure)

    def rebuilt(self) -> Any:
        """The tree."""
        others = iter(self.others)
        leaves = [next(others) if place < 0 else self.arrays[place] for place in self.places]
        return jax.tree.unflatten(self.structure, leaves)
