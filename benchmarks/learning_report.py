"""The table and the figure of the learning curves, from their records."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from common import describe, new_figure
from rich.table import Table


def by_setting(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The runs of each method and its options, the seeds together."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["method"], describe(record["options"])), []).append(record)
    return groups


def learning_table(records: list[dict], title: str) -> Table:
    """One row for each setting, the mean over its seeds, the best first."""
    table = Table(title=title)
    for column in ("method", "options"):
        table.add_column(column)
    for column in ("test log p", "sd (seeds)", "s.e. (data)", "ESS", "k > 0.7", "epochs", "s"):
        table.add_column(column, justify="right")
    table.add_column("ms / step", justify="right")
    rows = []
    for (method, options), group in by_setting(records).items():
        good = [record for record in group if record["error"] is None]

        def mean(key: str, group: list[dict] = good or group) -> float:
            return statistics.mean(record[key] for record in group)

        times = [f"{mean('epochs'):.1f}", f"{mean('seconds'):.1f}"]
        times.append(f"{1e3 * mean('seconds') / max(mean('steps'), 1):.2f}")
        if len(good) < len(group):
            options += f" ({len(group) - len(good)} of {len(group)} diverged)"
        if not good:
            rows.append((-math.inf, [method, options, "–", "–", "–", "–", "–", *times]))
            continue
        values = [record["log_p"] for record in good]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"
        cells = [f"{mean('log_p'):.2f}", spread, f"{mean('stderr'):.2f}", f"{mean('ess'):.0f}"]
        cells.append(f"{mean('khat_above_0.7'):.0%}")
        rows.append((mean("log_p"), [method, options, *cells, *times]))
    for _, cells in sorted(rows, key=lambda row: -row[0]):
        table.add_row(*cells)
    return table


def draw(records: list[dict], path: Path) -> None:
    """Writes the figure: test log-likelihood by epochs and by seconds, mean and sd over seeds.

    Of each method the setting with the best last point is drawn in full, the others faintly.
    """
    groups: dict[tuple[str, str], np.ndarray] = {}
    for setting, group in by_setting(records).items():
        good = [r for r in group if r.get("curve") and r["error"] is None]
        if good:
            shortest = min(len(r["curve"]) for r in good)
            # Seconds, epochs and log p; (seeds, points, 3).
            groups[setting] = np.array(
                [
                    [(s, n * r["epochs"] / r["steps"], p) for s, n, p, _ in r["curve"][:shortest]]
                    for r in good
                ]
            )
    if not groups:
        raise ValueError("no curve to draw: the records hold no run that ended well")
    methods = list(dict.fromkeys(method for method, _ in groups))
    ends = {setting: curve[:, -1, 2].mean() for setting, curve in groups.items()}
    best = {m: max((s for s in groups if s[0] == m), key=lambda s: ends[s]) for m in methods}
    figure, panels = new_figure(2)
    for panel, column, name in zip(panels, (1, 0), ("epochs", "training time (s)"), strict=True):
        for setting, curve in groups.items():
            full, mean = best[setting[0]] == setting, curve.mean(0)
            style = {"color": f"C{methods.index(setting[0])}", "alpha": 1.0 if full else 0.3}
            text = f"{setting[0]} ({setting[1]})" if full else None
            marker = "." if full else None
            panel.plot(mean[:, column], mean[:, 2], marker=marker, label=text, **style)
            if len(curve) > 1 and full:
                sd = curve[:, :, 2].std(0, ddof=1)
                low, high = mean[:, 2] - sd, mean[:, 2] + sd
                style["alpha"] = 0.2
                panel.fill_between(mean[:, column], low, high, linewidth=0, **style)
        points = np.concatenate([groups[s].mean(0)[1:, 2] for s in best.values()])
        top, low = points.max(), np.quantile(points, 0.05)
        margin = max(0.1 * (top - low), 1e-3)
        panel.set(xlabel=name, ylim=(low - margin, top + margin))
        panel.set_ylabel("test log-likelihood (nats)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    seeds = {len(curve) for curve in groups.values()}
    count = "–".join(map(str, sorted({min(seeds), max(seeds)})))
    figure.suptitle(f"{records[0]['data']}, {records[0]['layers']}, seeds: {count}", fontsize=10)
    figure.savefig(path, dpi=120)
