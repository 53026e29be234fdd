"""Draw quality against cost of a search.

python tools/draw_cost.py SWEEP_DIR cost=KEY output=FILE.svg

A mark for each trial of `tools/sweep.py`: its figure on validation against KEY, which is a searched key with numbers
(``loss.num_negatives``) or a figure of ``finished.json`` (``train_seconds``).
"""

import json
import sys
from typing import Any

import drawing
from matplotlib.figure import Figure

from glintru_rec.errors import InputError


def cost_of(trial: dict[str, Any], key: str) -> float:
    """Give what a trial cost.

    Raises:
        InputError: it has no such number.
    """
    value = trial["values"].get(key, trial["finished"].get(key))
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"cost is {key!r}, which is {value!r} in the trial {trial['values']}: it must be a number") from error


def draw(sweep: dict[str, Any], key: str) -> Figure:
    """Draw a sweep, as ``sweep.json`` has it."""
    points = sorted((cost_of(trial, key), trial["value"]) for trial in sweep["trials"])
    if not points:
        raise InputError("the sweep has no trial that ended")
    figure, axes = drawing.panels(1, 5.6, 3.4)
    axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1)
    low, high = points[0][0], points[-1][0]
    axes.set_xscale("log" if high > 10 * low > 0 else "linear")
    axes.set(xlabel=key, ylabel=sweep["metric"])
    return figure


def main(sources: dict[str, str], cost: str) -> Figure:
    """Draw the search that a command line names."""
    folder = drawing.only_source(sources)
    path = folder / "sweep.json"
    if not path.is_file():
        raise InputError(f"{folder} is no output of tools/sweep.py: it has no sweep.json")
    return draw(json.loads(path.read_text()), cost)


if __name__ == "__main__":
    sys.exit(drawing.run(__doc__, main, "cost"))
