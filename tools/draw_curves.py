"""Draw the training curves of runs.

python tools/draw_curves.py RUN_DIR [RUN_DIR ...] output=FILE.svg

Mean training loss against steps at the left, validation NDCG@10 against epochs at the right, out of ``metrics.jsonl``. A run
has the name of its folder, or NAME in NAME=RUN_DIR.
"""

import json
import sys
from pathlib import Path

import drawing
from matplotlib.figure import Figure

from glintru_rec.errors import InputError


def read_curves(run_dir: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Read (step, training loss) and (epoch, validation NDCG@10) of a run; a line that a kill cut short is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    train = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    valid = [(record["epoch"], record["ndcg@10"]) for record in records if record["kind"] == "valid"]
    return train, valid


def draw(runs: dict[str, Path]) -> Figure:
    """Draw the curves of runs, name → run directory."""
    figure, (losses, figures) = drawing.panels(2, 9, 3.4)
    for name, run_dir in runs.items():
        train, valid = read_curves(run_dir)
        losses.plot(*zip(*train), label=name, linewidth=1.2)
        figures.plot(*zip(*valid), label=name, marker="o", markersize=3, linewidth=1.2)
    losses.set(xlabel="step", ylabel="training loss, nats")
    figures.set(xlabel="epoch", ylabel="NDCG@10 (valid)")
    figures.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(fontsize=8, loc="upper right")
    return figure


def main(sources: dict[str, str]) -> Figure:
    """Draw the runs that a command line names."""
    return draw({name if run_dir else Path(name).name: Path(run_dir or name) for name, run_dir in sources.items()})


if __name__ == "__main__":
    sys.exit(drawing.run(__doc__, main))
