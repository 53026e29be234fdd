"""Draw what a catalog's size costs: step time and memory.

python tools/draw_catalog.py FIGURES.csv output=FILE.svg

FIGURES.csv is what ``tools/bench_catalog.py --figures FIGURES.csv`` has written; of several runs the last figures count.
"""

import csv
import sys
from pathlib import Path

import drawing
from matplotlib.figure import Figure

from glintru_rec.errors import InputError

PANELS = {"ratio": "step, against the smallest catalog", "peak_gib": "peak memory of a rank, GiB"}


def read_figures(path: Path) -> dict[int, list[dict[str, float]]]:
    """Read the figures of each number of ranks, by the number of items.

    Raises:
        InputError: there are none.
    """
    rows: dict[str, dict[str, float]] = {}
    try:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if line["benchmark"] == "bench_catalog":
                    rows.setdefault(line["row"], {})[line["figure"]] = float(line["value"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no file of figures: {error!r}") from error
    if not rows:
        raise InputError(f"{str(path)!r} has no figures of tools/bench_catalog.py")
    by_ranks: dict[int, list[dict[str, float]]] = {}
    for row in sorted(rows.values(), key=lambda row: row["items"]):
        by_ranks.setdefault(int(row["ranks"]), []).append(row)
    return by_ranks


def draw(by_ranks: dict[int, list[dict[str, float]]]) -> Figure:
    """Draw the figures of each number of ranks."""
    figure, panels = drawing.panels(len(PANELS), 7.6, 3.2)
    for axes, (key, title) in zip(panels, PANELS.items()):
        for ranks, rows in by_ranks.items():
            name = f"{ranks} rank{'s' * (ranks > 1)}"
            axes.plot(
                [row["items"] for row in rows], [row[key] for row in rows], marker="o", markersize=4, linewidth=1, label=name
            )
        axes.set(xscale="log", xlabel="items", ylabel=title)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return figure


def main(sources: dict[str, str]) -> Figure:
    """Draw the file that a command line names."""
    return draw(read_figures(drawing.only_source(sources)))


if __name__ == "__main__":
    sys.exit(drawing.run(__doc__, main))
