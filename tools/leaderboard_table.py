"""The table of a leaderboard: means over seeds, markdown, a plot. `tools/leaderboard.py` makes the runs.

A run is what `tools/leaderboard.py` writes of one training and its evaluation::

    {"entry": …, "seed": 0, "metrics": {"hr@10": …}, "training": finished.json, "protocol": …, "machine": …, "versions": …}
"""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from glintru_rec.metrics import Protocol

QUALITY = ("hr@10", "ndcg@10")
TRAINING = ("valid_ndcg@10", "best_epoch", "train_seconds", "targets_per_second")


class Figure(NamedTuple):
    """A figure over seeds."""

    mean: float
    std: float | None
    """Of a sample: divided by n - 1. None for one seed."""
    n: int


def over_seeds(values: Iterable[float | None]) -> Figure | None:
    """Sum up one figure of an entry's runs, leaving out runs that lack it; None if all do."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Figure(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def build_row(entry: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the runs of one entry.

    Args:
        entry: name, group, note and overrides; they are copied.
        runs: of this entry, one per seed; there may be none.

    Returns:
        The entry with ``seeds``, ``num_parameters``, ``peak_memory_bytes`` (the highest) and ``figures``: for every
        name of `QUALITY` and `TRAINING` its mean, std and n, or None.
    """
    figures = {name: over_seeds(run["metrics"].get(name) for run in runs) for name in QUALITY}
    figures |= {name: over_seeds(run["training"].get(name) for run in runs) for name in TRAINING}
    peaks = [peak for run in runs if (peak := run["training"].get("peak_memory_bytes")) is not None]
    return {
        **entry,
        "seeds": [run["seed"] for run in runs],
        "num_parameters": next((run["training"].get("num_parameters") for run in runs), None),
        "peak_memory_bytes": max(peaks, default=None),
        "figures": {name: figure and figure._asdict() for name, figure in figures.items()},
    }


def to_markdown(board: dict[str, Any]) -> str:
    """Write the whole leaderboard, the conditions of its figures above them.

    Args:
        board: what ``leaderboard.json`` holds.
    """
    grouped = any(row["group"] for row in board["rows"])
    header = ["model", *["group"] * grouped, "HR@10", "NDCG@10", "seeds", "NDCG@10 (valid)", "parameters (encoder + table)"]
    header += ["best epoch", "training, min", "targets/s", "peak memory, MB"]
    body = [_cells(row, grouped) for row in board["rows"]]
    for anchor in board["published"]:
        quality = [_short(anchor["figures"].get(name)) for name in QUALITY]
        first = [f"{anchor['name']}, published", *[""] * grouped, *quality]
        body.append(first + [""] * (len(header) - len(first)))
    lines = [f"## {board['title']}", "", *conditions(board), ""]
    for cells in [header, ["---", *["---"] * grouped, *["--:"] * (len(header) - 1 - grouped)], *body]:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    remarks = [f"* {row['name']}: {row['note']}" for row in board["rows"] if row["note"]]
    remarks += [f"* {anchor['name']}, published: {anchor['source']}" for anchor in board["published"]]
    remarks += [f"* {missing} is missing." for missing in board["missing"]]
    return "\n".join([*lines, "", *remarks]).rstrip() + "\n"


def conditions(board: dict[str, Any]) -> list[str]:
    """Say what the figures depend on, a line each; what differs between runs is listed with all its values."""
    runs, data = board["runs"], board["dataset"]
    lines = [
        f"* Data: {data['num_users']:,} users, {data['num_items']:,} items, {data['num_events']:,} events (`{data['path']}`)."
    ]
    if not runs:
        return [*lines, "* No run has ended yet."]
    if board["overrides"]:
        lines.append(f"* Every training: `{' '.join(board['overrides'])}`.")
    protocols = _distinct(runs, lambda run: str(_protocol(run["protocol"])))
    lengths = _distinct(runs, lambda run: run["protocol"]["max_seq_len"])
    lines.append(f"* Protocol: {protocols}. Histories of at most {lengths} items.")
    lines.append(
        f"* Checkpoint: the best by NDCG@10 on valid. Mean ± standard deviation (n − 1) over seeds "
        f"{', '.join(str(seed) for seed in sorted({run['seed'] for run in runs}))}."
    )
    machine = _distinct(runs, lambda run: _machine(run["machine"]))
    torch, commit = (_distinct(runs, lambda run, name=name: run["versions"].get(name)) for name in ("torch", "commit"))
    lines.append(f"* Machine: {machine}; torch {torch}; commit {commit}.")
    return lines


def draw(board: dict[str, Any], path: Path) -> None:
    """Draw test NDCG@10 against training minutes: a mark per entry, a line per published figure, names at the right.

    Args:
        board: what ``leaderboard.json`` holds, with at least one run that says its seconds.
        path: file to write; its ending decides the format.
    """
    import drawing
    from matplotlib import ticker

    rows = drawn_rows(board)
    kinds = [row["group"] or row["name"] for row in rows]  # one color each
    figure, axes = drawing.panels(1, 8, 5)
    names: list[tuple[float, float, str, str]] = []  # a place, the name of what is there, its color
    for row, kind in zip(rows, kinds):
        minutes, quality = row["figures"]["train_seconds"]["mean"] / 60, row["figures"]["ndcg@10"]
        color = f"C{list(dict.fromkeys(kinds)).index(kind) % 10}"
        axes.errorbar(minutes, quality["mean"], yerr=quality["std"] or 0, fmt="o", capsize=3, color=color)
        names.append((minutes, quality["mean"], row["name"], color))
    times = [minutes for minutes, *_ in names]
    if max(times) > 10 * min(times) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.08, y=0.08)
    for anchor in board["published"]:
        if "ndcg@10" in anchor["figures"]:
            axes.axhline(anchor["figures"]["ndcg@10"], color="0.75", linewidth=1, linestyle="--", zorder=0)
            names.append((axes.get_xlim()[1], anchor["figures"]["ndcg@10"], f"{anchor['name']}, published", "0.5"))
    axes.set(xlabel="training, minutes", ylabel="NDCG@10 (test)", title=board["title"])
    _write_names(axes, names)
    drawing.save(figure, path)


def drawn_rows(board: dict[str, Any]) -> list[dict[str, Any]]:
    """List the rows that have a place in the plot."""
    return [row for row in board["rows"] if row["figures"]["ndcg@10"] and row["figures"]["train_seconds"]]


def _write_names(axes: Any, names: list[tuple[float, float, str, str]]) -> None:
    """Write names in a column at the right, in the order of their places' heights, each with a line to its place."""
    names = sorted(names, key=lambda name: name[1])
    low, high = axes.get_ylim()
    apart = 0.045  # of the axes' height, a line of text
    heights: list[float] = []
    for _, y, _, _ in names:
        heights.append(max((y - low) / (high - low), heights[-1] + apart if heights else 0.0))
    for at in reversed(range(len(heights))):  # a column pushed out at the top goes down again
        heights[at] = min(heights[at], heights[at + 1] - apart if at + 1 < len(heights) else 1.0)
    for (x, y, name, color), height in zip(names, heights):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": color, "linewidth": 0.5, "alpha": 0.7}
        where = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(name, (x, y), **where, fontsize=8, color=color, arrowprops=line, annotation_clip=False)


def _cells(row: dict[str, Any], grouped: bool) -> list[str]:
    """Write one entry's cells; what it has no figure for stays empty."""
    figures, size = row["figures"], row["num_parameters"]

    def mean(name: str, write: Callable[[float], str]) -> str:
        return write(figures[name]["mean"]) if figures[name] else ""

    peak = row["peak_memory_bytes"]
    return [
        row["name"],
        *[row["group"]] * grouped,
        *[_with_std(figures[name]) for name in QUALITY],
        str(len(row["seeds"])),
        _with_std(figures["valid_ndcg@10"]),
        f"{size['encoder']:,} + {size['table']:,}" if size else "",
        mean("best_epoch", lambda value: f"{value:.3g}"),
        mean("train_seconds", lambda value: f"{value / 60:.{1 if value >= 600 else 2}f}"),
        mean("targets_per_second", lambda value: f"{value:,.0f}"),
        f"{peak / 1e6:,.0f}" if peak is not None else "",
    ]


def _with_std(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    return _short(figure["mean"]) + (f" ± {_short(figure['std'])}" if figure["std"] is not None else "")


def _short(value: float | None) -> str:
    """Write a share as papers do: ``.0521``."""
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def _protocol(described: dict[str, Any]) -> Protocol:
    names = ("candidates", "exclude_seen", "ks", "split")
    return Protocol(**{name: described[name] for name in names}, seed=described["seed"] or 0)


def _machine(machine: dict[str, Any]) -> str:
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    beside = f", {machine['jobs']} trainings side by side" if machine["jobs"] > 1 else ""
    return f"{machine['cpu']}, {machine['cores']} cores{gpu}, threads per training: {machine['threads']}{beside}"


def _distinct(runs: list[dict[str, Any]], value_of: Callable[..., Any]) -> str:
    return " / ".join(dict.fromkeys(str(value_of(run)) for run in runs))
