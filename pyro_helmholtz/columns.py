"""How a parameter's elements fill the (units, columns) matrix of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    @cached_property
    def _plain(self) -> bool:
        """Whether the leaf is the matrix."""
        return self.index is None and not self.transposed and self.leaf_shape == self.shape

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
        if self._plain:
            return value
        if self.index is not None:
            return value.reshape(-1)[self.index]
        if self.transposed:
            return value.reshape(self.shape[1], self.shape[0]).t()
        return value.reshape(self.shape)

    def to_leaf(self, value: Tensor) -> Tensor:
        """The inverse of ``to_units``."""
        if self._plain:
            return value
        if self.index is not None:
            flat = torch.empty(self.leaf_shape.numel(), dtype=value.dtype, device=value.device)
            flat[self.index.reshape(-1)] = value.reshape(-1)
            return flat.reshape(self.leaf_shape)
        if self.transposed:
            return value.t().reshape(self.leaf_shape)
        return value.reshape(self.leaf_shape)
