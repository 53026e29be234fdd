"""Draw quality against cost of a search.

python tools/draw_cost.py SWEEP_DIR cost=KEY output=FILE.svg

A mark for each trial of `tools/sweep.py`: its figure on validation against KEY, which is a searched key with numbers
(``loss.num_negatives``) or a figure of ``finished.json`` (``train_seconds``).
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from glintru_rec.errors import InputError

matplotlib.use("Agg")
from matplotlib import pyplot


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


def draw(sweep: dict[str, Any], key: str, output: Path) -> None:
    """Draw a sweep, as ``sweep.json`` has it, into a file; its ending decides the format."""
    matplotlib.rcParams["svg.hashsalt"] = "cost"  # the same figures give the same file
    points = sorted((cost_of(trial, key), trial["value"]) for trial in sweep["trials"])
    if not points:
        raise InputError("the sweep has no trial that ended")
    figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1)
    low, high = points[0][0], points[-1][0]
    axes.set_xscale("log" if high > 10 * low > 0 else "linear")
    axes.set(xlabel=key, ylabel=sweep["metric"])
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Read the command line, draw; give the exit status."""
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    folders = [name for name, value in given.items() if not value]
    if len(folders) != 1 or not {"cost", "output"} <= set(given):
        print(__doc__)
        return 2
    try:
        path = Path(folders[0]) / "sweep.json"
        if not path.is_file():
            raise InputError(f"{folders[0]} is no output of tools/sweep.py: it has no sweep.json")
        draw(json.loads(path.read_text()), given["cost"], Path(given["output"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
