"""What the tools that draw share: matplotlib without a display, files that depend on the figures alone, command lines."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from glintru_rec.errors import InputError
from glintru_rec.files import check_writable

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure


def panels(columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Begin a picture of panels side by side, in inches; gives it and its axes, or its only one."""
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whose ending decides the format; the same drawing gives the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "glintru_rec"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def only_source(sources: dict[str, str]) -> Path:
    """Give the one file or folder that is to be drawn.

    Raises:
        InputError: there are several.
    """
    if len(sources) > 1:
        raise InputError(f"one file or folder can be drawn, not {', '.join(sources)}")
    return Path(next(iter(sources)))


def run(doc: str, draw: Callable[..., Figure], *keys: str) -> int:
    """Draw what a command line of sources and ``key=value`` asks for into the file ``output=…``.

    Args:
        doc: says how the program is called; printed where it is called otherwise.
        draw: takes source → name it was given, or "", and a value for each of ``keys``.
        keys: that must be given besides ``output``.

    Returns:
        The exit status: 2 for bad input.
    """
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    values = {key: given.pop(key, "") for key in (*keys, "output")}
    if not given or not all(values.values()) or {"-h", "--help"} & set(given):
        print(doc)
        return 2
    output = Path(values.pop("output"))
    try:
        check_writable(output)
        save(draw(given, **values), output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
