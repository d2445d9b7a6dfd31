"""Rows and units of a sum of affine terms: which element of it belongs to which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import graph
from .columns import Columns, Opaque
from .terms import Term


@dataclass(frozen=True)
class Plan:
    """The index maps of a root; they depend on shapes alone.

    Attributes:
        row, unit: of each element of the root (flat). num_rows: how many rows.
        row_maps: per term, its row for each row of the root, or None where they are the same.
        columns: per term, where its parameter's elements stand.
    """

    row: Tensor
    unit: Tensor
    num_rows: int
    row_maps: list[Tensor | None]
    columns: list[Columns]


def make(terms: list[Term], shape: torch.Size) -> Plan:
    """The plan of a root.

    Args:
        terms: of the sum, the primary one first. shape: of the sum.

    Raises:
        Opaque: the terms do not have units in common.
    """
    device = terms[0].leaf.device
    primary = terms[0]

    def index_of(term: Term) -> Tensor:
        return graph.lift_index(term.chain, term.out_shape(), shape, device).reshape(-1)

    if primary.direct:
        if len(terms) > 1:
            raise Opaque("a sum of parameters")
        unit = index_of(primary)
        count = primary.leaf.numel()
        columns = [Columns(primary.leaf.shape, None, False, (count, 1))]
        return Plan(torch.zeros_like(unit), unit, 1, [None], columns)

    row, unit = primary.rows_and_units(index_of(primary))
    columns = [primary.columns()]
    units = columns[0].shape[0]
    rows = int(primary.out_shape().numel() // units)
    row_maps: list[Tensor | None] = [None]
    for term in terms[1:]:
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
    return Plan(row, unit, rows, row_maps, columns)


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
