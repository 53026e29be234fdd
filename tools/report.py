"""One HTML page of a run, with nothing beside it: curves, evaluation, leaderboard, balance of the table, scoring, versions.

python tools/report.py RUN_DIR [evaluation=FILE] [scores=DIR] [leaderboard=DIR] output=PAGE.html

RUN_DIR is a run of launch/train.py, finished or not; evaluation the file that launch/evaluate.py wrote; scores a folder of
launch/score.py, of any mode but update; leaderboard one of tools/leaderboard.py. What a run does not have is left out of its
page.
"""

import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from report_chart import Series, line_chart

from glintru_rec.errors import InputError
from glintru_rec.files import check_writable, write_text

KEYS = ("evaluation", "scores", "leaderboard", "output")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1000px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee4; }
p { margin: .3rem 0; } .quiet { color: #57606a; } .charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #eaeef2; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #57606a; font-weight: 600; }
.bar { background: #ddf0ff; height: 1.1rem; width: 16rem; } .bar > div { background: #0969da; height: 100%; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media print { body { margin: 0; max-width: none; } }
"""


def read(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; the last line may be cut short, as the run may be going on or have been killed."""
    try:
        lines = path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}; give the folder of a run") from error


def number(value: Any) -> str:
    """Write a figure as a reader wants it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Html(str):
    """A text that is HTML, to be left as it is."""


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Write a table; cells that are `Html` are left as they are, all others escaped."""

    def cell(value: Any) -> str:
        return value if isinstance(value, Html) else escape(number(value))

    head = "".join(f"<th>{escape(name)}</th>" for name in header if any(header))
    body = "".join(f"<tr>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(share: float) -> Html:
    """Draw a share of 1."""
    return Html(f'<div class="bar"><div style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></div></div>')


def section(title: str, *parts: str) -> str:
    """Put a heading above what there is."""
    return f"<h2>{escape(title)}</h2>\n{''.join(parts)}\n"


def curves(records: list[dict[str, Any]]) -> str:
    """Draw the loss, the validation figures and the speed over steps."""
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    names = sorted({name for record in valid for name, value in record.items() if isinstance(value, float)})
    chosen = [name for name in ("ndcg@10", "hr@10") if name in names] or [name for name in names if name.endswith("auc")][:3]
    charts = [
        line_chart("training loss", [_series("loss", train)]),
        line_chart("validation", [_series(name, valid) for name in chosen]),
        line_chart("speed, targets/s", [_series("targets_per_second", train)]),
    ]
    return section("Training", '<div class="charts">', *charts, "</div>")


def _series(name: str, records: list[dict[str, Any]]) -> Series:
    return Series(name, [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)])


def evaluation_section(evaluation: dict[str, Any]) -> str:
    """Show the figures of a split, by name and length of the list."""
    metrics, protocol = evaluation["metrics"], evaluation["protocol"]
    ks = sorted({int(name.split("@")[1]) for name in metrics if "@" in name})
    names = list(dict.fromkeys(name.split("@")[0] for name in metrics if "@" in name))
    figures = {name: f"{value:.4f}" for name, value in metrics.items()}
    rows = [[name, *(figures.get(f"{name}@{k}", "") for k in ks)] for name in names]
    whole = ", ".join(f"{name} {value}" for name, value in figures.items() if "@" not in name)
    said = {name.replace("_", " "): value for name, value in protocol.items() if name != "ks" and value is not None}
    how = ", ".join(f"{name}: {number(value)}" for name, value in said.items())
    parts = [table(["at", *map(str, ks)], rows), f"<p>{escape(whole)}</p>", f'<p class="quiet">{escape(how)}</p>']
    return section(f"Evaluation on {protocol.get('split', '?')}", *parts)


def leaderboard_section(board: dict[str, Any]) -> str:
    """Show the models that were compared, means over seeds."""

    def figure(row: dict[str, Any], name: str) -> str:
        value = row["figures"].get(name)
        spread = f" ± {value['std']:.4f}" if value and value["std"] is not None and value["n"] > 1 else ""
        return f"{value['mean']:.4f}{spread}" if value else ""

    rows = [
        [row["name"], row["group"], figure(row, "hr@10"), figure(row, "ndcg@10"), len(row["seeds"]), row["note"]]
        for row in board["rows"]
    ]
    missing = "".join(f"<p>{escape(name)} is missing.</p>" for name in board["missing"])
    return section(board["title"], table(["model", "group", "HR@10", "NDCG@10", "seeds", "note"], rows), missing)


def plan_section(plan: dict[str, Any]) -> str:
    """Show which rank holds how much of the item table."""
    held = plan["bytes_per_rank"]
    most = max(held, default=0) or 1
    rows = [[f"rank {rank}", size / 2**20, bar(size / most)] for rank, size in enumerate(held)]
    mean = sum(held) / max(len(held), 1) or 1
    what = f"{plan['num_items']:,} items × {plan['row_width']}, {plan['sharding']}, {plan['dtype']}; "
    balance = f"the fullest rank holds {max(held, default=0) / mean:.2f} of the mean"
    return section("Balance of the item table", f"<p>{escape(what + balance)}</p>", table(["", "MiB", ""], rows))


def scoring_section(report: dict[str, Any]) -> str:
    """Show what became of the rows of a scoring job, and at which rate."""
    timing = report["timing"]
    rows = [["rows in", report["rows_in"]], ["scored", report["rows_scored"]]]
    rows += [[f"set aside: {reason}", count] for reason, count in report["rows_set_aside"].items()]
    rows += [["unknown items in histories", report["unknown_history_items"]], ["rows/s", timing["rows_per_second"]]]
    at_work = sum(timing["seconds"].values()) or 1
    stages = [[stage, seconds, bar(seconds / at_work)] for stage, seconds in timing["seconds"].items()]
    failed = "".join(f"<p>could not be read: {escape(name)}: {escape(why)}</p>" for name, why in report["failed"].items())
    config = report["config"]
    what = f"mode {config['mode']}, {report['fragments']} file(s), batches of {config['batch_size']}, on {config['device']}"
    parts = [f"<p>{escape(what)}</p>", table(["", ""], rows), failed, table(["stage", "seconds at work", ""], stages)]
    return section("Scoring", *parts)


def _written(write: Callable[[Any], str], content: Any, what: str, path: Path) -> str:
    try:
        return write(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not what {what} should be: {error!r}") from error


def page(run_dir: Path, given: dict[str, str]) -> str:
    """Make the page.

    Args:
        run_dir: of a run.
        given: paths of what else there is, by the names of `KEYS`.

    Raises:
        InputError: the run has no log, or a file that was named cannot be read or is of another kind.
    """
    records = read_lines(run_dir / "metrics.jsonl")
    finished = read(run_dir / "finished.json") if (run_dir / "finished.json").exists() else {}
    said = ", ".join(f"{name} {number(value)}" for name, value in finished.items() if isinstance(value, int | float))
    parts = [f"<h1>{escape(run_dir.resolve().name)}</h1><p>{escape(said or 'not finished')}</p>\n"]
    parts.append(_written(curves, records, "the log of a run", run_dir / "metrics.jsonl"))
    wanted = {
        "evaluation": (evaluation_section, Path(given.get("evaluation", ""))),
        "leaderboard": (leaderboard_section, Path(given.get("leaderboard", "")) / "leaderboard.json"),
        "plan": (plan_section, run_dir / "plan.json"),
        "scores": (scoring_section, Path(given.get("scores", "")) / "report.json"),
    }
    for key, (write, path) in wanted.items():
        if key in given or (key == "plan" and path.exists()):
            parts.append(_written(write, read(path), key, path))
    if (run_dir / "versions.json").exists():
        versions = [[name, value] for name, value in read(run_dir / "versions.json").items() if value]
        parts.append(section("Versions", table(["", ""], versions)))
    if (run_dir / "config.yaml").exists():
        config = escape((run_dir / "config.yaml").read_text())
        parts.append(section("Config", f"<details><summary>config.yaml</summary><pre>{config}</pre></details>"))
    title = escape(run_dir.resolve().name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{"".join(parts)}</body></html>\n'
    )


def main(arguments: list[str]) -> int:
    """Read the command line and write the page."""
    paths = [argument for argument in arguments if "=" not in argument]
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(paths) != 1 or "output" not in given or not set(given) <= set(KEYS) or not all(given.values()):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        check_writable(Path(given["output"]))
        write_text(Path(given["output"]), page(Path(paths[0]), given))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {given['output']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
