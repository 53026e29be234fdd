"""What a search asks for, and its trainings: each in a folder, resumable, judged by its validations."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from leaderboard import FailedProgram, last_line, program_environment

from glintru_rec.config import check, check_at_least, compose, one_of
from glintru_rec.errors import InputError
from glintru_rec.files import write_json
from glintru_rec.programs.launcher import task_of
from glintru_rec.programs.train import STOPPED

POLL_SECONDS = 0.5
# A median says little of fewer.
LEAST_FOR_MEDIAN = 3


@dataclass
class Sweep:
    """What the command line asks for.

    Attributes:
        output: the folder of all trials.
        fixed: overrides of every training.
        searched: hydra's overrides with several values.
    """

    output: Path
    sampler: str = "grid"
    trials: int = 20
    metric: str = "valid_ndcg@10"
    direction: str = "maximize"
    pruner: str = "none"
    jobs: int = 1
    nproc: int = 1
    seed: int = 0
    fixed: list[str] = field(default_factory=list)
    searched: list[Override] = field(default_factory=list)

    def __post_init__(self):
        one_of("sampler", self.sampler, ("grid", "tpe", "random"))
        one_of("direction", self.direction, ("maximize", "minimize"))
        one_of("pruner", self.pruner, ("none", "median"))
        check_at_least(1, "", self, ("trials", "jobs", "nproc"))
        check("searched keys", [], bool(self.searched), "at least one key with several values, such as model=glint_ru,lru_rec")
        for each in self.searched:
            discrete = self.sampler != "grid" or not isinstance(each.value(), IntervalSweep)
            check(each.input_line, "an interval", discrete, "a list or range with sampler=grid; or take sampler=tpe")

    @property
    def record_name(self) -> str:
        """Name of the metric in the validation records of ``metrics.jsonl``."""
        return re.sub(r"^valid[_.]", "", self.metric)

    def is_better(self, value: float, other: float) -> bool:
        """Whether a figure is better than another."""
        return value > other if self.direction == "maximize" else value < other


@dataclass
class Trial:
    """One training.

    Attributes:
        values: searched key → value, as written on a command line.
        folder: of its run directory, log and ``result.json``.
    """

    values: dict[str, str]
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Read what it came to; None: it has not ended."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def trial_of(sweep: Sweep, values: dict[str, str]) -> Trial:
    """Name the folder of a combination: its values, as far as a file's name can say them, and a checksum."""
    said = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in values.items())
    readable = re.sub(r"[^\w.+-]+", "-", said)[:80]
    mark = hashlib.sha256(json.dumps([values, sweep.fixed]).encode()).hexdigest()[:8]
    return Trial(values, sweep.output / "trials" / f"{readable}_{mark}")


class Runner:
    """Train trials, a few at a time, and judge their validations."""

    def __init__(self, sweep: Sweep, lock: int):
        self.sweep, self.lock = sweep, lock
        self.environment = program_environment(sweep.jobs)
        self.processes: set[subprocess.Popen] = set()
        self.failures: dict[str, str] = {}
        self.curves: dict[Path, dict[int, float]] = {}  # folder → epoch → best value so far
        self.guard = threading.Lock()
        self.ending = False

    def run(self, trial: Trial) -> dict[str, Any] | None:
        """Train, unless there is a result already; give it, or None where the training failed."""
        if trial.result() is None and not self.ending:
            try:
                self._train(trial)
            except (FailedProgram, InputError) as error:
                with self.guard:
                    self.failures[str(trial)] = str(error)
                print(f"failed: {trial}: {error}", flush=True)
                return None
        result = trial.result()
        if result is not None:
            with self.guard:
                self.curves[trial.folder] = {int(epoch): value for epoch, value in result["curve"].items()}
            print(f"{self.sweep.metric} {result['value']:.4f}  {result['status']}  {trial}", flush=True)
        return result

    def stop(self) -> None:
        """Stop what runs: it saves, and the same command goes on with it."""
        self.ending = True
        for process in list(self.processes):
            process.terminate()

    def _train(self, trial: Trial) -> None:
        sweep, run_dir = self.sweep, trial.folder / "run"
        arguments = [*sweep.fixed, *(f"{key}={value}" for key, value in trial.values.items())]
        arguments += [f"output={run_dir}", "trainer.resume=true"]
        check_arguments(arguments)
        trial.folder.mkdir(parents=True, exist_ok=True)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sweep.nproc}"] if sweep.nproc > 1 else []
        start, log = time.monotonic(), trial.folder / "train.log"
        with log.open("ab") as file:
            command = [sys.executable, *launch, "-m", "launch.train", *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environment, pass_fds=[self.lock]
            )
            self.processes.add(process)
            pruned = False
            while process.poll() is None:
                if sweep.pruner == "median" and not pruned and self._is_behind(trial):
                    pruned = True
                    process.terminate()
                time.sleep(POLL_SECONDS)
            self.processes.discard(process)
        if self.ending:
            raise FailedProgram("stopped; the same command goes on with it")
        curve = self._curve(trial)
        # torchelastic makes any status of its ranks a 1.
        if pruned and process.returncode in (STOPPED, 1, -signal.SIGTERM) and curve:
            status, value = "stopped early", curve[max(curve)]
            finished: dict[str, Any] = {}
        elif process.returncode:
            raise FailedProgram(f"train failed (exit status {process.returncode}): {last_line(log)}  [{log}]")
        else:
            finished = json.loads((run_dir / "finished.json").read_text())
            status, value = "done", figure_of(finished, sweep.metric)
        result = {"values": trial.values, "status": status, "metric": sweep.metric, "value": value}
        result |= {"arguments": arguments, "curve": curve}
        write_json(trial.folder / "result.json", {**result, "finished": finished, "seconds": time.monotonic() - start})

    def _curve(self, trial: Trial) -> dict[int, float]:
        """Read the best validation so far after each epoch that had one."""
        path = trial.folder / "run" / "metrics.jsonl"
        curve: dict[int, float] = {}
        for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
            record = json.loads(line) if line.endswith("\n") else {"kind": "cut short"}
            if record["kind"] == "valid" and self.sweep.record_name in record:
                value, best = record[self.sweep.record_name], next(reversed(curve.values()), None)
                curve[record["epoch"]] = value if best is None or self.sweep.is_better(value, best) else best
        return curve

    def _is_behind(self, trial: Trial) -> bool:
        """Whether the others' median at this trial's last validation is better than its best so far."""
        own = self._curve(trial)
        if not own:
            return False
        epoch = max(own)
        with self.guard:
            self.curves[trial.folder] = own
            others = [curve[epoch] for folder, curve in self.curves.items() if folder != trial.folder and epoch in curve]
        ordered = sorted(others, reverse=self.sweep.direction == "maximize")
        return len(others) >= LEAST_FOR_MEDIAN and self.sweep.is_better(ordered[len(ordered) // 2], own[epoch])


def check_arguments(arguments: list[str]) -> None:
    """Raise an `InputError` unless the arguments make a config."""
    if task_of(arguments) == "ranking":
        from glintru_rec.ranking.config import RankingConfig

        compose("train_ranking", RankingConfig, arguments)
    else:
        from glintru_rec.training.config import TrainConfig

        compose("train", TrainConfig, arguments)


def figure_of(finished: dict[str, Any], metric: str) -> float:
    """Look a figure up in ``finished.json``; ``valid.click.auc`` is ``click.auc`` of ``valid``."""
    group, _, name = metric.partition(".")
    found = finished.get(metric, finished[group].get(name) if isinstance(finished.get(group), dict) else None)
    if not isinstance(found, int | float):
        raise InputError(f"metric is {metric!r}, which finished.json does not have; it has {', '.join(_figures(finished))}")
    return float(found)


def _figures(finished: dict[str, Any]) -> list[str]:
    inner = [f"{key}.{name}" for key, value in finished.items() if isinstance(value, dict) for name in value]
    return [key for key, value in finished.items() if isinstance(value, int | float)] + inner
