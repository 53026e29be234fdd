"""Write the reference of every config key, out of the dataclasses that decide them: what `make docs` shows.

python tools/config_reference.py FILE.md

A key's meaning, and the reason for it, are its class's ``Attributes``; its unit follows from its type and name.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args

from omegaconf import MISSING

from glintru_rec.config import CONFIG_DIR
from glintru_rec.data.prepare import PrepareConfig
from glintru_rec.programs.evaluate import EvaluateConfig
from glintru_rec.programs.export import ExportConfig
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.prepare import PrepareRankingConfig
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.training.config import TrainConfig

PROGRAMS: dict[str, type] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "score": ScoreConfig,
    "prepare task=ranking": PrepareRankingConfig,
    "train task=ranking": RankingConfig,
}
# The last word of a key that says its unit; a longer ending comes before its own ending.
UNITS = {
    "every_steps": "steps",
    "every_epochs": "epochs",
    "steps": "steps",
    "epochs": "epochs",
    "patience": "validations",
    "seconds": "s",
    "gib": "GiB",
    "gb": "GB",
    "mb": "MB",
    "users": "users",
    "events": "events",
    "examples": "examples",
    "targets": "targets",
    "negatives": "items",
    "candidates": "items",
    "seq_len": "items",
    "top_k": "items",
    "rows": "rows",
    "dim": "numbers",
    "width": "numbers",
    "ids_per_step": "ids",
    "horizon": "items",
    "last": "checkpoints",
    "best": "checkpoints",
    "share": "share, 0 to 1",
    "threads": "threads",
}


class Key(NamedTuple):
    """One key of a program."""

    name: str
    kind: str
    default: str
    unit: str
    meaning: str


def attributes_of(schema: type) -> dict[str, str]:
    """Read the ``Attributes`` of a Google docstring: name → text in one line."""
    lines = inspect.cleandoc(schema.__doc__ or "").splitlines()
    start = lines.index("Attributes:") + 1 if "Attributes:" in lines else len(lines)
    found: dict[str, str] = {}
    name = ""
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2].strip()
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """List the keys of a schema and of those inside it.

    Raises:
        KeyError: a key without a description.
    """
    meanings = attributes_of(schema)
    kinds = inspect.get_annotations(schema, eval_str=True)
    inner = []
    for entry in dataclasses.fields(schema):
        kind = kinds[entry.name]
        if dataclasses.is_dataclass(kind):
            inner.append((kind, f"{prefix}{entry.name}."))
            continue
        yield Key(f"{prefix}{entry.name}", _name(kind), _default(entry), _unit(entry.name, kind), meanings[entry.name])
    for kind, inner_prefix in inner:
        yield from keys_of(kind, inner_prefix)


def _name(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join("null" if part is NoneType else _name(part) for part in get_args(kind))
    return kind.__name__ if inspect.isclass(kind) and not getattr(kind, "__args__", None) else str(kind).replace("typing.", "")


def _default(entry: dataclasses.Field) -> str:
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if value is dataclasses.MISSING or value == MISSING:
        return "must be given"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return "empty" if value in ("", {}, []) else str(value)


def _unit(name: str, kind: Any) -> str:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if int not in kinds and float not in kinds:
        return ""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "number")


def groups() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """List the config groups: name, and of each choice its name and the first line that its file says of it."""
    for folder in sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name != "leaderboard"):
        choices = []
        for file in sorted(folder.glob("*.yaml")):
            comments = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
            choices.append((file.stem, next((line for line in comments if not line.startswith("@")), "")))
        yield folder.name, choices


def to_markdown() -> str:
    """Write the page."""
    lines = [
        "# Every config key",
        "",
        "Made of the schemas by `tools/config_reference.py`; `python -m launch.NAME --help` says the same.",
    ]
    lines += ["What a group's file sets wins over the default here.", ""]
    for program, schema in PROGRAMS.items():
        lines += [f"## {program}", "", inspect.cleandoc(schema.__doc__ or "").splitlines()[0], ""]
        lines += ["| key | type | unit | default | what it does, and why |", "| --- | --- | --- | --- | --- |"]
        for key in keys_of(schema):
            cells = [f"`{key.name}`", f"`{key.kind}`", key.unit, f"`{key.default}`", key.meaning.replace("``", "`")]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += [
        "## Groups",
        "",
        "`group=choice` takes a file of `configs/group/`.",
        "",
        "| group | choice | |",
        "| --- | --- | --- |",
    ]
    for group, choices in groups():
        lines += [f"| `{group}` | `{choice}` | {text.replace('|', chr(92) + '|')} |" for choice, text in choices]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the file that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    Path(sys.argv[1]).write_text(to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
