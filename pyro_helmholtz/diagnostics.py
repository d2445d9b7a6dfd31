"""What the library made of a program, in words: the structure report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .fisher.blocks import Block
from .fisher.matrix_free import MatrixFreeBlock


@dataclass(frozen=True)
class Row:
    """One block of the report.

    Attributes:
        params: names. site: what they feed. kind: affine, convolution, direct, site or none.
        units, fan_in, size: of the block. exact: whether its information is exact.
        solver: how it is solved. note: where the information comes from, and why a block
            is not one per unit.
    """

    params: tuple[str, ...]
    site: str
    kind: str
    units: int
    fan_in: int
    size: int
    exact: bool
    solver: str
    note: str


@dataclass(frozen=True)
class Structure:
    """The report; iterate over its rows or print it."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        head = ("parameters", "site", "kind", "units", "fan-in", "size", "exact", "solver", "note")
        table = [head] + [
            (
                " + ".join(row.params),
                row.site,
                row.kind,
                str(row.units),
                str(row.fan_in),
                str(row.size),
                "yes" if row.exact else "no",
                row.solver,
                row.note,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe(
    blocks: Sequence[Block], leaves: Mapping[str, Tensor], uncovered: Mapping[str, list[str]]
) -> Structure:
    """The structure report of blocks; parameters without a block are listed last.

    Args:
        blocks: of the Fisher matrix. leaves: the parameters by name.
        uncovered: the sites that parameters without a block feed, where known.
    """
    rows = []
    covered: set[str] = set()
    for block in blocks:
        covered |= set(block.params)
        note = block.how
        if isinstance(block, MatrixFreeBlock):
            note = f"{note}; whole site: {block.reason}"
        rows.append(
            Row(
                tuple(block.params),
                block.site,
                block.kind,
                block.units,
                block.fan_in,
                block.size,
                block.exact,
                block.method(),
                note,
            )
        )
    for name in leaves:
        if name not in covered:
            site = ", ".join(uncovered.get(name, []))
            note = "no Fisher information"
            rows.append(Row((name,), site, "none", 0, 0, 0, False, "plain gradient", note))
    return Structure(tuple(rows))
