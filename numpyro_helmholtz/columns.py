"""How the elements of a parameter fill the (units, columns) matrix of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .graph import Opaque

Array = Any


@dataclass(eq=False)
class Columns:
    """How a parameter's elements fill the (units, columns) matrix.

    Attributes:
        leaf_shape: of the parameter. index: flat index of the leaf's element in each place,
            or None where the leaf is this matrix reshaped. transposed: it is its transpose.
        shape: (units, columns).
    """

    leaf_shape: tuple[int, ...]
    index: np.ndarray | None
    transposed: bool
    shape: tuple[int, int]

    @classmethod
    def of(cls, leaf_shape: tuple[int, ...], index: np.ndarray) -> Columns:
        """From the flat index of the leaf in each (unit, column)."""
        flat = np.arange(index.size)
        shape = (index.shape[0], index.shape[1])
        size = int(np.prod(leaf_shape))
        if index.size == size:
            if np.array_equal(index.reshape(-1), flat):
                return cls(leaf_shape, None, False, shape)
            if np.array_equal(index.T.reshape(-1), flat):
                return cls(leaf_shape, None, True, shape)
        if index.size != size or np.unique(index).size != size:
            raise Opaque("a weight is used at several places of one layer, or not at all")
        return cls(leaf_shape, index, False, shape)

    def indices(self) -> np.ndarray:
        """Flat index of the leaf's element in each (unit, column)."""
        return self.to_units(np.arange(int(np.prod(self.leaf_shape))).reshape(self.leaf_shape))

    def to_units(self, value: Array) -> Array:
        """An array in the leaf's shape as (units, columns)."""
        if self.index is not None:
            return value.reshape(-1)[self.index]
        if self.transposed:
            return value.reshape(self.shape[1], self.shape[0]).T
        return value.reshape(self.shape)

    def to_leaf(self, value: Array) -> Array:
        """The inverse of ``to_units``."""
        if self.index is not None:
            return jnp.take(value.reshape(-1), np.argsort(self.index.reshape(-1))).reshape(
                self.leaf_shape
            )
        return (value.T if self.transposed else value).reshape(self.leaf_shape)

    def same(self, other: Columns) -> bool:
        """Whether two parameters fill their matrices in the same way."""
        if self.leaf_shape != other.leaf_shape or self.transposed != other.transposed:
            return False
        if self.index is None or other.index is None:
            return self.index is other.index
        return np.array_equal(self.index, other.index)
