"""Train and evaluate a list of models over seeds with the project's own programs, and write the table.

python tools/leaderboard.py LIST data.path=DATASET output=DIR [seeds=0,1,2] [jobs=1] [key=value ...] [--table-only]

LIST is a file such as configs/leaderboard/beauty.yaml: entries are hydra overrides of launch/train.py, after those of the
whole list. Further key=value go to every training and come last. Each (entry, seed) trains into DIR/runs/ENTRY/seed-N/run, is
evaluated once on test with the checkpoint that was best on valid, and writes result.json there. Called again, the same command
skips what has a result, goes on with what was killed, and tries again what failed; a run that was made with another config is
refused.
Writes DIR/leaderboard.md, .json (with every run) and .svg. Exit status: 0; 1 where a training or evaluation failed; 2
for bad input. With other numbers of threads (jobs=N divides them) figures may differ in their last digits.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from leaderboard_list import LeaderboardList, Pair, check_runs, fingerprint, plan
from leaderboard_table import build_row, draw, drawn_rows, to_markdown

import glintru_rec
from glintru_rec.config import check, from_yaml
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.dataset_files import is_raw
from glintru_rec.errors import InputError
from glintru_rec.files import write_json, write_text
from glintru_rec.progress import format_seconds

REPORT_SECONDS = 30.0


class FailedProgram(Exception):
    """A training or evaluation ended with an error."""


def run_pairs(pairs: list[Pair], jobs: int, lock: int) -> dict[str, str]:
    """Run what has no result yet, ``jobs`` at a time, and say how it goes.

    Args:
        pairs: in the order of their start.
        jobs: trainings side by side; the threads are divided among them.
        lock: file descriptor that the programs inherit.

    Returns:
        What failed: the pair's name, and why.
    """
    waiting = [pair for pair in pairs if pair.result() is None]
    print(f"{len(pairs) - len(waiting)} of {len(pairs)} done before", flush=True)
    environment = program_environment(jobs)
    start = time.monotonic()
    failures: dict[str, str] = {}
    processes: dict[str, tuple[subprocess.Popen, Path]] = {}  # those that run now, with their logs
    with ThreadPoolExecutor(jobs) as pool:
        submitted: dict[str, Future[None]] = {}
        for pair in waiting:  # in order: a base has a thread before those that wait for it
            base = submitted.get(str(pair.base))
            submitted[str(pair)] = pool.submit(run_pair, pair, jobs, environment, lock, processes, base)
        futures = {submitted[str(pair)]: pair for pair in waiting}
        pending = set(futures)
        try:
            while pending:
                ended, pending = wait(pending, REPORT_SECONDS, FIRST_COMPLETED)
                left = f"{len(pairs) - len(pending)}/{len(pairs)}  {_times(pairs, len(pending), jobs, start)}"
                for future in ended:
                    pair, error = futures[future], future.exception()
                    if error is not None and not isinstance(error, FailedProgram):
                        raise error
                    if error is not None:
                        failures[str(pair)] = str(error)
                    print(f"{left}  {pair}: {error or _figures(pair)}", flush=True)
                for name, (_, log) in [] if ended else list(processes.items()):
                    print(f"{left}  {name}: {last_line(log)}", flush=True)
        except BaseException:  # also Ctrl-C and SIGTERM: a training left behind would hold the machine for hours
            pool.shutdown(wait=False, cancel_futures=True)
            for process, _ in list(processes.values()):
                process.terminate()
            raise
    return failures


def run_pair(pair: Pair, jobs: int, environment: dict[str, str], lock: int, processes: dict, base: Future[None] | None) -> None:
    """Wait for the ``base``, if there is one, train, evaluate on test, and write ``result.json``.

    Raises:
        FailedProgram: with the program's last line and where its output is.
    """
    if base is not None and base.exception() is not None:
        raise FailedProgram(f"{pair.base}, which it starts from, failed")
    start = time.monotonic()
    run_dir, evaluation = pair.folder / "run", pair.folder / "evaluation.json"
    pair.folder.mkdir(parents=True, exist_ok=True)
    if run_dir.exists() and not (run_dir / "config.yaml").is_file():
        shutil.rmtree(run_dir)  # killed before it began: nothing to go on with

    def run(program: str, *arguments: str) -> None:
        log = pair.folder / f"{program}.log"
        with log.open("ab") as file:
            command = [sys.executable, "-m", f"launch.{program}", *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, pass_fds=[lock]
            )
            processes[str(pair)] = (process, log)
            try:
                status = process.wait()
            finally:
                del processes[str(pair)]
        if status:
            raise FailedProgram(f"{program} failed (exit status {status}): {last_line(log)}  [{log}]")

    run("train", *pair.arguments)
    where = [f"checkpoint={run_dir}", f"data.path={pair.config.data.path}", f"output={evaluation}"]
    run("evaluate", *where, "split=test", f"device={pair.config.trainer.device}")
    evaluated, versions = json.loads(evaluation.read_text()), json.loads((run_dir / "versions.json").read_text())
    result = {
        "entry": pair.entry.name,
        "seed": pair.seed,
        "arguments": pair.arguments,
        "fingerprint": fingerprint(pair.config),
        "metrics": evaluated["metrics"],
        "training": json.loads((run_dir / "finished.json").read_text()),
        "protocol": evaluated["protocol"],
        "vocabulary_sha256": evaluated["vocabulary_sha256"],
        "machine": {
            **describe_machine(pair.config.trainer.device),
            "threads": int(environment["OMP_NUM_THREADS"]),
            "jobs": jobs,
        },
        "versions": versions,
        "wall_seconds": time.monotonic() - start,
    }
    write_json(pair.folder / "result.json", result)


def program_environment(jobs: int) -> dict[str, str]:
    """Give each of ``jobs`` programs its share of the threads: of ``OMP_NUM_THREADS`` where that is set, else of the cores."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or _cores())
    path = [str(Path(glintru_rec.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # As the TorchX jobs have it: waiting threads that spin slow other programs down.
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")
    own = {"OMP_NUM_THREADS": str(max(1, threads // jobs)), "GOMP_SPINCOUNT": spin, "PYTHONPATH": os.pathsep.join(path)}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1"}


def describe_machine(device: str) -> dict[str, Any]:
    """Name the processor, the cores that may be used, and the GPU that a training with this ``trainer.device`` takes."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    gpu = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None
    return {"cpu": names[0] if names else os.uname().machine, "cores": _cores(), "gpu": gpu}


def write_tables(listed: LeaderboardList, common: list[str], pairs: list[Pair], dataset: dict[str, Any], output: Path) -> Path:
    """Write ``leaderboard.json``, ``.md`` and ``.svg`` from the results there are; give the markdown's path."""
    (output / "leaderboard.svg").unlink(missing_ok=True)
    runs = [result for pair in pairs if (result := pair.result()) is not None]
    board = {
        "title": listed.title,
        "dataset": dataset,
        "overrides": [*listed.overrides, *common],
        "rows": [build_row(asdict(entry), [run for run in runs if run["entry"] == entry.name]) for entry in listed.entries],
        "published": [asdict(each) for each in listed.published],
        "missing": [str(pair) for pair in pairs if pair.result() is None],
        "runs": runs,
    }
    write_json(output / "leaderboard.json", board)
    write_text(output / "leaderboard.md", to_markdown(board))
    try:
        if drawn_rows(board):
            draw(board, output / "leaderboard.svg")
    except ModuleNotFoundError as error:
        print(f"no plot: {error} (pip install matplotlib)", file=sys.stderr, flush=True)
    return output / "leaderboard.md"


@contextmanager
def locked(output: Path, what: str = "leaderboard") -> Iterator[int]:
    """Hold the output folder; programs that inherit the lock hold it too, and outlive a killed ``what`` with it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={output} cannot be made: {error}") from error
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"output={output} is in use by another {what}, or a training that one left behind") from error
        yield file.fileno()


def leaderboard(list_file: Path, overrides: list[str], table_only: bool) -> int:
    """Do what the command line says; give the exit status."""
    own: dict[str, str] = {}
    common = []
    for override in overrides:
        key, is_pair, value = override.partition("=")
        if key in ("data.path", "output", "seeds", "jobs") and is_pair:
            own[key] = value
        else:
            common.append(override)
    for key in ("data.path", "output"):
        if not own.get(key):
            raise InputError(f"missing value: give {key}=…")
    listed = from_yaml(list_file, LeaderboardList)
    seeds = _integers("seeds", own["seeds"]) if "seeds" in own else listed.seeds
    jobs, output = _integers("jobs", own.get("jobs", "1")), Path(own["output"])
    check("jobs", own.get("jobs"), len(jobs) == 1 and jobs[0] >= 1, "a number of at least 1")
    manifest = SequenceDataset.open(own["data.path"]).manifest
    if is_raw(manifest):
        raise InputError(f"data.path={own['data.path']} was prepared with ids=raw: nobody knows its catalog; give ids=dense")
    pairs = plan(listed, seeds, common, own["data.path"], output)
    dataset = {"path": own["data.path"], **{key: manifest[key] for key in ("num_users", "num_items", "num_events")}}
    check_runs(pairs, manifest["vocabulary_sha256"])
    failures = {}
    if table_only and not output.is_dir():
        raise InputError(f"output={output} does not exist: there is nothing to make a table of")
    if not table_only:
        with locked(output) as lock:
            failures = run_pairs(pairs, jobs[0], lock)
    table = write_tables(listed, common, pairs, dataset, output)
    print(
        f"\n{table.read_text()}\nwritten: {', '.join(str(path) for path in sorted(output.glob('leaderboard.*')))}", flush=True
    )
    for name, why in failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr, flush=True)
    return 1 if failures else 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, metavar="LIST")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--table-only", action="store_true", help="write the table of the runs there are")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return leaderboard(arguments.list, arguments.overrides, arguments.table_only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _integers(key: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{key} is {text!r}; it must be integers with commas between them") from error


def _times(pairs: list[Pair], num_pending: int, jobs: int, start: float) -> str:
    """Say how long it took and may take: by what a pair took so far, in this call or an earlier one."""
    elapsed = time.monotonic() - start
    took = [result["wall_seconds"] for pair in pairs if (result := pair.result()) is not None]
    left = f"ETA {format_seconds(sum(took) / len(took) * num_pending / jobs)}" if took else "ETA unknown"
    return f"elapsed {format_seconds(elapsed)}  {left}"


def _figures(pair: Pair) -> str:
    result = pair.result()
    assert result is not None
    return "  ".join(f"{name} {result['metrics'][name]:.4f}" for name in ("hr@10", "ndcg@10")) + "  (test)"


def last_line(log: Path) -> str:
    """Give the last line of a program's output that says anything."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
