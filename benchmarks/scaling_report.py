"""Tables, exponents and the figure of the scaling benchmark, from its records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from common import new_figure, show
from rich.table import Table

LABELS = {"width": "width of the layers", "particles": "particles K", "depth": "hidden layers"}


def label(record: dict) -> str:
    """A curve's name."""
    name, phase = record["contender"], record.get("phase")
    if phase == "first":
        return f"{name}, first {record['first_steps']} steps"
    return name


def curves(records: list[dict], axis: str, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sizes and milliseconds of each curve of an axis."""
    found: dict[str, list] = {}
    for record in records:
        if record["axis"] == axis and key in record:
            found.setdefault(label(record), []).append((record["value"], record[key]))
    return {name: tuple(np.array(sorted(points)).T) for name, points in found.items()}


def exponent(x: np.ndarray, y: np.ndarray, upper: bool) -> tuple[float, int]:
    """The slope of log y on log x by least squares, and the number of points it comes from."""
    if upper:
        kept = x >= math.sqrt(x.min() * x.max()) * (1 - 1e-9)
        x, y = x[kept], y[kept]
    if len(x) < 2:
        return math.nan, len(x)
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]), len(x)


def report(records: list[dict]) -> None:
    """Prints a table for each axis, what is left out, and the exponents."""
    for axis, name in LABELS.items():
        mine = [record for record in records if record["axis"] == axis]
        if not mine:
            continue
        some = mine[0]
        fixed = {"width": some["width"], "K": some["particles"], "hidden layers": some["depth"]}
        fixed.pop({"width": "width", "particles": "K", "depth": "hidden layers"}[axis])
        settings = ", ".join(f"{key} = {value}" for key, value in fixed.items())
        table = Table(title=f"{name}: {settings}, B = {some['batch_size']}, {some['device']}")
        columns = ["update", "median ms", "min ms", "without eigh, median", "min"]
        columns += ["one eigh ms", "/ rws", "GiB", "compile s"]
        for column in (axis, *columns):
            table.add_column(column, justify="left" if column == "update" else "right")
        for r in mine:
            if "left_out" in r:
                table.add_row(str(r["value"]), r["contender"], "left out", *"–––––––")
                continue
            keys = ("median", "min", "block_median", "block_min", "basis_ms")
            cells = [f"{r[key]:.3f}" for key in keys]
            cells.append(f"{r['ratio_to_rws']:.2f}" if "ratio_to_rws" in r else "–")
            cells += [f"{r['gib']:.2f}", f"{r['compile_s']:.1f}"]
            bad = "" if r["finite"] else " (not finite)"
            table.add_row(str(r["value"]), label(r) + bad, *cells)
        show(table)
        for r in mine:
            if "left_out" in r:
                print(f"left out: {r['contender']} at {axis} {r['value']}: {r['left_out']}")
        report_exponents(mine, axis)


def report_exponents(records: list[dict], axis: str) -> None:
    """Prints the slopes of every curve."""
    table = Table(title=f"exponents: time ~ {axis}^p (number of points)")
    for column in ("update", "upper half", "whole range", "upper, by minima", "upper, no eigh"):
        table.add_column(column, justify="left" if column == "update" else "right")
    by_key = {key: curves(records, axis, key) for key in ("median", "min", "block_median")}
    for name in by_key["median"]:
        ways = [("median", True), ("median", False), ("min", True), ("block_median", True)]
        cells = []
        for key, upper in ways:
            slope, count = exponent(*by_key[key][name], upper)
            cells.append(f"{slope:.2f} ({count})")
        table.add_row(name, *cells)
    show(table)


def draw(records: list[dict], path: Path) -> None:
    """Writes the figure: one panel for each axis, with the exponents of the upper half."""
    axes = [axis for axis in LABELS if curves(records, axis, "median")]
    if not axes:
        raise ValueError("nothing to draw: every form is left out at every size")
    figure, panels = new_figure(len(axes))
    for axis, panel in zip(axes, panels, strict=True):
        lows = curves(records, axis, "min")
        for name, (x, y) in curves(records, axis, "median").items():
            slope, _ = exponent(x, y, upper=True)
            text = name if math.isnan(slope) else f"{name}: {slope:.2f}"
            (drawn,) = panel.plot(x, y, marker=".", label=text)
            panel.fill_between(x, lows[name][1], y, color=drawn.get_color(), alpha=0.2)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
        panel.set_ylabel("ms per update (median, shaded down to the minimum)", fontsize=8)
        ticks = sorted({r["value"] for r in records if r["axis"] == axis and "median" in r})
        panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8, rotation=45)
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, title="exponent of the upper half", title_fontsize=8)
    figure.savefig(path, dpi=120)
