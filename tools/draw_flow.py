"""Draw how the programs and one training step hang together: python tools/draw_flow.py [FOLDER], by default docs/pictures."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import drawing
import matplotlib
from matplotlib.patches import FancyBboxPatch

DATA, PROGRAM, PART = "#e8eef7", "#fdf1dc", "#e9f5e9"
GREY = "0.35"


class Flow:
    """Boxes with text and arrows between them, in units of the figure's inches."""

    def __init__(self, width: float, height: float):
        matplotlib.rcParams.update({"font.size": 9})
        self.figure, self.axes = drawing.panels(1, width, height)
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


def draw_programs() -> Flow:
    """Draw what each program reads and writes."""
    flow = Flow(10.4, 3.1)
    data = [
        (0.1, "interaction log", "parquet, csv,\n.inter, .dat"),
        (2.2, "dataset", "vocabulary,\nsequences"),
        (4.3, "run directory", "checkpoints,\nmetrics"),
        (6.4, "artifact", "TorchScript,\nitem table"),
        (8.5, "ranked candidates", "parquet"),
    ]
    for x, name, what in data:
        flow.box(x, 1.9, 1.6, 0.9, f"{name}\n{what}", DATA)
    for (x, *_), program in zip(data, ("prepare", "train", "export", "score")):
        flow.box(x + 1.05, 0.75, 1.6, 0.45, program, PROGRAM)
        flow.arrow((x + 0.8, 1.9), (x + 0.8, 1.55), (x + 1.5, 1.55), (x + 1.5, 1.2))
        flow.arrow((x + 2.2, 1.2), (x + 2.2, 1.55), (x + 2.7, 1.55), (x + 2.7, 1.9))
    flow.box(4.2, 0.05, 1.8, 0.42, "evaluate → figures", PROGRAM)
    flow.arrow((5.1, 1.9), (5.1, 0.47))
    flow.box(8.5, 0.05, 1.6, 0.42, "states of users", DATA)
    flow.arrow((8.65, 0.75), (8.65, 0.47))
    flow.arrow((8.9, 0.47), (8.9, 0.75))
    return flow


def draw_model() -> Flow:
    """Draw one training step and one block of GLINT-RU."""
    flow = Flow(10.4, 4.4)
    flow.box(0.1, 3.3, 2.0, 0.8, "histories\na b c d | x y", DATA)
    flow.box(0.1, 0.4, 2.0, 0.8, "negatives\nn1 … nK", DATA)
    flow.box(2.7, 1.75, 1.7, 1.0, "item table\nsharded over ranks", PART)
    flow.arrow((1.1, 3.3), (1.1, 2.35), (2.7, 2.35))
    flow.arrow((1.1, 1.2), (1.1, 2.15), (2.7, 2.15))
    flow.text(1.9, 2.55, "one exchange", fontsize=8, color=GREY)
    flow.axes.add_patch(
        FancyBboxPatch((5.0, 1.2), 3.55, 2.95, boxstyle="round,pad=0,rounding_size=0.1", facecolor="none", edgecolor=GREY)
    )
    flow.text(6.77, 3.98, "GLINT-RU block, at every position", fontsize=8, color=GREY)
    flow.box(5.2, 2.85, 1.35, 0.8, "linear attention\n$\\sum_{m \\leq n} \\hat{k}_m v_m^\\top$", PART)
    flow.box(5.2, 1.5, 1.35, 0.8, "dense GRU\nconv – GRU – conv", PART)
    flow.box(6.95, 2.2, 0.6, 0.75, "gate", PART)
    flow.box(7.85, 2.2, 0.6, 0.75, "MLP", PART)
    flow.arrow((4.4, 2.25), (4.8, 2.25), (4.8, 3.25), (5.2, 3.25))
    flow.arrow((4.4, 2.25), (4.8, 2.25), (4.8, 1.9), (5.2, 1.9))
    flow.arrow((6.55, 3.25), (6.75, 3.25), (6.75, 2.7), (6.95, 2.7))
    flow.arrow((6.55, 1.9), (6.75, 1.9), (6.75, 2.4), (6.95, 2.4))
    flow.arrow((7.55, 2.575), (7.85, 2.575))
    flow.box(8.85, 2.2, 1.4, 0.75, "hidden\nafter a b c | x", DATA)
    flow.arrow((8.45, 2.575), (8.85, 2.575))
    flow.box(6.3, 0.25, 3.95, 0.65, "softmax(hidden · target against negatives)", PROGRAM)
    flow.arrow((9.55, 2.2), (9.55, 0.9))
    flow.arrow((3.55, 1.75), (3.55, 0.575), (6.3, 0.575))
    flow.text(4.95, 0.72, "targets b c d | y, and negatives", fontsize=8, color=GREY)
    flow.arrow((8.0, 0.25), (8.0, 0.1), (3.0, 0.1), (3.0, 1.75))
    flow.text(4.95, 0.22, "rows change inside backward", fontsize=8, color=GREY)
    return flow


def main(folder: Path) -> None:
    """Write both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    drawing.save(draw_programs().figure, folder / "programs.svg")
    drawing.save(draw_model().figure, folder / "model.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "pictures")
