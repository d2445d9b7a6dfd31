"""What the benchmarks of both hosts share: options, JSON lines, tables, figures."""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# options


def describe(options: dict) -> str:
    """The options on one line."""
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def parse_options(text: str) -> dict[str, Any]:
    """Reads ``"damping=0.2,fisher=kronecker"``."""
    options = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    return options


def settings(args: argparse.Namespace, rates: dict[str, list]) -> list[tuple[str, dict]]:
    """Every method with every one of its settings.

    Args:
        args: with ``methods``, ``lr``, ``grid`` and ``natural`` as ``learning.py --help`` says.
        rates: of each method that there is, unless ``args`` gives others.

    Raises:
        ValueError: a method that there is not.
    """
    grid = dict(rates)
    if args.lr:
        grid |= {name: [float(lr) for lr in args.lr.split(",")] for name in rates}
    for item in args.grid:
        name, _, given = item.partition("=")
        if name not in rates:
            raise ValueError(f"--grid {item}: no method {name!r}; there are {sorted(rates)}")
        grid[name] = [float(lr) for lr in given.split(",")]
    found = []
    for method in args.methods.split(","):
        if method not in rates:
            raise ValueError(f"--methods: no method {method!r}; there are {sorted(rates)}")
        bases = [parse_options(text) for text in args.natural] if method == "natural" else []
        for base in bases or [{}]:
            # A rate among --natural's options stands; the grid is for those without.
            tried: list = [None] if "lr" in base else grid[method]
            found += [(method, base if lr is None else {**base, "lr": lr}) for lr in tried]
    return found


# files


def append_lines(path: Path | None, records: Iterable[dict]) -> None:
    """Appends one JSON line for each record, where there is a file."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure, to be saved without a display, and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


# tables


def show(table: Table, width: int = 160) -> None:
    """Prints a table; a file or a pipe has no need to fold it at 80 columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    console.print(table)
