"""Draw how the programs and one training step hang together: python tools/draw_flow.py [FOLDER], by default docs/pictures."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

DATA, PROGRAM, PART = "#e8eef7", "#fdf1dc", "#e9f5e9"
GREY = "0.35"


class Drawing:
    """Boxes with text and arrows between them, in units of the figure's inches."""

    def __init__(self, width: float, height: float):
        matplotlib.rcParams.update({"svg.hashsalt": "flow", "font.size": 9, "svg.fonttype": "path"})
        self.figure, self.axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        """Draw a box whose lower left corner is at x, y."""
        style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": color, "edgecolor": GREY, "linewidth": 0.8}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
        self.text(x + width / 2, y + height / 2, text)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text around x, y."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", **style})

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through points with a head at the last."""
        for start, end in pairwise(points[:-1]):
            self.axes.plot(*zip(start, end), color=GREY, linewidth=0.9, solid_capstyle="butt")
        head = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", points[-1], points[-2], arrowprops=head)

    def save(self, path: Path) -> None:
        """Write the picture; the same drawing gives the same file."""
        self.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        pyplot.close(self.figure)


def draw_programs() -> Drawing:
    """Draw what each program reads and writes."""
    drawing = Drawing(10.4, 3.1)
    data = [
        (0.1, "interaction log", "parquet, csv,\n.inter, .dat"),
        (2.2, "dataset", "vocabulary,\nsequences"),
        (4.3, "run directory", "checkpoints,\nmetrics"),
        (6.4, "artifact", "TorchScript,\nitem table"),
        (8.5, "ranked candidates", "parquet"),
    ]
    for x, name, what in data:
        drawing.box(x, 1.9, 1.6, 0.9, f"{name}\n{what}", DATA)
    for (x, *_), program in zip(data, ("prepare", "train", "export", "score")):
        drawing.box(x + 1.05, 0.75, 1.6, 0.45, program, PROGRAM)
        drawing.arrow((x + 0.8, 1.9), (x + 0.8, 1.55), (x + 1.5, 1.55), (x + 1.5, 1.2))
        drawing.arrow((x + 2.2, 1.2), (x + 2.2, 1.55), (x + 2.7, 1.55), (x + 2.7, 1.9))
    drawing.box(4.2, 0.05, 1.8, 0.42, "evaluate → figures", PROGRAM)
    drawing.arrow((5.1, 1.9), (5.1, 0.47))
    drawing.box(8.5, 0.05, 1.6, 0.42, "states of users", DATA)
    drawing.arrow((8.65, 0.75), (8.65, 0.47))
    drawing.arrow((8.9, 0.47), (8.9, 0.75))
    return drawing


def draw_model() -> Drawing:
    """Draw one training step and one block of GLINT-RU."""
    drawing = Drawing(10.4, 4.4)
    drawing.box(0.1, 3.3, 2.0, 0.8, "histories\na b c d | x y", DATA)
    drawing.box(0.1, 0.4, 2.0, 0.8, "negatives\nn1 … nK", DATA)
    drawing.box(2.7, 1.75, 1.7, 1.0, "item table\nsharded over ranks", PART)
    drawing.arrow((1.1, 3.3), (1.1, 2.35), (2.7, 2.35))
    drawing.arrow((1.1, 1.2), (1.1, 2.15), (2.7, 2.15))
    drawing.text(1.9, 2.55, "one exchange", fontsize=8, color=GREY)
    drawing.axes.add_patch(
        FancyBboxPatch((5.0, 1.2), 3.55, 2.95, boxstyle="round,pad=0,rounding_size=0.1", facecolor="none", edgecolor=GREY)
    )
    drawing.text(6.77, 3.98, "GLINT-RU block, at every position", fontsize=8, color=GREY)
    drawing.box(5.2, 2.85, 1.35, 0.8, "linear attention\n$\\sum_{m \\leq n} \\hat{k}_m v_m^\\top$", PART)
    drawing.box(5.2, 1.5, 1.35, 0.8, "dense GRU\nconv – GRU – conv", PART)
    drawing.box(6.95, 2.2, 0.6, 0.75, "gate", PART)
    drawing.box(7.85, 2.2, 0.6, 0.75, "MLP", PART)
    drawing.arrow((4.4, 2.25), (4.8, 2.25), (4.8, 3.25), (5.2, 3.25))
    drawing.arrow((4.4, 2.25), (4.8, 2.25), (4.8, 1.9), (5.2, 1.9))
    drawing.arrow((6.55, 3.25), (6.75, 3.25), (6.75, 2.7), (6.95, 2.7))
    drawing.arrow((6.55, 1.9), (6.75, 1.9), (6.75, 2.4), (6.95, 2.4))
    drawing.arrow((7.55, 2.575), (7.85, 2.575))
    drawing.box(8.85, 2.2, 1.4, 0.75, "hidden\nafter a b c | x", DATA)
    drawing.arrow((8.45, 2.575), (8.85, 2.575))
    drawing.box(6.3, 0.25, 3.95, 0.65, "softmax(hidden · target against negatives)", PROGRAM)
    drawing.arrow((9.55, 2.2), (9.55, 0.9))
    drawing.arrow((3.55, 1.75), (3.55, 0.575), (6.3, 0.575))
    drawing.text(4.95, 0.72, "targets b c d | y, and negatives", fontsize=8, color=GREY)
    drawing.arrow((8.0, 0.25), (8.0, 0.1), (3.0, 0.1), (3.0, 1.75))
    drawing.text(4.95, 0.22, "rows change inside backward", fontsize=8, color=GREY)
    return drawing


def main(folder: Path) -> None:
    """Write both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_programs().save(folder / "programs.svg")
    draw_model().save(folder / "model.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "pictures")
