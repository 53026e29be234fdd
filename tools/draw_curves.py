"""Draw the training curves of runs.

python tools/draw_curves.py RUN_DIR [RUN_DIR ...] output=FILE.svg

Mean training loss against steps at the left, validation NDCG@10 against epochs at the right, out of ``metrics.jsonl``. A run
has the name of its folder, or NAME in NAME=RUN_DIR.
"""

import json
import sys
from pathlib import Path

import matplotlib

from glintru_rec.errors import InputError

matplotlib.use("Agg")
from matplotlib import pyplot


def read_curves(run_dir: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Read (step, training loss) and (epoch, validation NDCG@10) of a run; a line that a kill cut short is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    train = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    valid = [(record["epoch"], record["ndcg@10"]) for record in records if record["kind"] == "valid"]
    return train, valid


def draw(runs: dict[str, Path], output: Path) -> None:
    """Draw the runs' curves into a file; its ending decides the format."""
    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same figures give the same file
    figure, (losses, figures) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, run_dir in runs.items():
        train, valid = read_curves(run_dir)
        losses.plot(*zip(*train), label=name, linewidth=1.2)
        figures.plot(*zip(*valid), label=name, marker="o", markersize=3, linewidth=1.2)
    losses.set(xlabel="step", ylabel="training loss, nats")
    figures.set(xlabel="epoch", ylabel="NDCG@10 (valid)")
    losses.legend(fontsize=8, loc="upper right")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Read the command line, draw; give the exit status."""
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    output = given.pop("output", "")
    runs = {name if value else Path(name).name: Path(value or name) for name, value in given.items()}
    if not output or not runs or "-h" in given or "--help" in given:
        print(__doc__)
        return 2
    try:
        draw(runs, Path(output))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
