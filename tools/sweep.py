"""Search hyper-parameters: trainings over the values of some keys, chosen on validation, in one table.

python tools/sweep.py data.path=DATASET output=DIR optimizer.learning_rate=1e-3,3e-3 model=glint_ru,lru_rec [key=value ...]
python tools/sweep.py data.path=DATASET output=DIR sampler=tpe trials=20 'optimizer.learning_rate=tag(log,interval(1e-4,1e-2))'

Every key=value goes to launch/train.py, of either task. Keys with several values, in hydra's words, are searched: ``1,2``,
``choice(a,b)``, ``range(start,stop,step)``, and for tpe and random ``interval(low,high)``, ``int(interval(2,8))``,
``tag(log,interval(…))``. Besides:

    sampler    grid (all combinations; default), or Optuna's (extra sweep) tpe and random
    trials     how many of tpe and random; 20
    metric     of the best weights, in finished.json: valid_ndcg@10; for ranking such as valid.click.auc
    direction  maximize (default) or minimize
    pruner     none (default), or median: stops what is worse at a validation than half of the others were there
    jobs       trainings side by side, which share the threads; 1
    nproc      ranks of a training; 1
    seed       of the sampler; 0

Each training has a folder below DIR/trials, named by its values, with its run directory in it. The same command again skips
what has a result, goes on with what was killed, and tries again what failed. DIR gets sweep.md (best first) and sweep.json.
Nothing is evaluated on test: that is for the one that you choose. Exit status: 0; 1 where a training failed; 2 for bad input.
"""

import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from leaderboard import FailedProgram, last_line, locked, program_environment

from glintru_rec.config import check, compose, one_of
from glintru_rec.errors import InputError
from glintru_rec.files import write_json, write_text
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
        for key in ("trials", "jobs", "nproc"):
            check(key, getattr(self, key), getattr(self, key) >= 1, "at least 1")
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


def read_command_line(arguments: list[str]) -> Sweep:
    """Tell this program's keys from the trainings', and fixed ones from searched ones."""
    numbers = {"trials", "jobs", "nproc", "seed"}
    own: dict[str, Any] = {}
    others = []
    for argument in arguments:
        key, is_pair, value = argument.partition("=")
        if is_pair and key in {"sampler", "metric", "direction", "pruner", "output", *numbers}:
            own[key] = value
        else:
            others.append(argument)
    for key in numbers & set(own):
        check(key, own[key], own[key].isdigit(), "a whole number")
        own[key] = int(own[key])
    if not own.get("output"):
        raise InputError("missing value: give output=…")
    try:
        parsed = OverridesParser.create().parse_overrides(others)
    except HydraException as error:
        raise InputError(str(error)) from error
    searched = [each for each in parsed if each.is_sweep_override()]
    fixed = [each.input_line for each in parsed if not each.is_sweep_override()]
    return Sweep(**{**own, "output": Path(own["output"])}, fixed=fixed, searched=searched)


def trial_of(sweep: Sweep, values: dict[str, str]) -> Trial:
    """Name the folder of a combination: its values, as far as a file's name can say them, and a checksum."""
    said = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in values.items())
    readable = re.sub(r"[^\w.+-]+", "-", said)[:80]
    mark = hashlib.sha256(json.dumps([values, sweep.fixed]).encode()).hexdigest()[:8]
    return Trial(values, sweep.output / "trials" / f"{readable}_{mark}")


def grid(sweep: Sweep) -> list[Trial]:
    """List all combinations, the last key's values next to each other."""
    choices = [list(each.sweep_string_iterator()) for each in sweep.searched]
    keys = [each.get_key_element() for each in sweep.searched]
    return [trial_of(sweep, dict(zip(keys, values))) for values in itertools.product(*choices)]


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


def check_metric(sweep: Sweep) -> None:
    """Raise an `InputError` where the results of earlier calls are figures of another metric."""
    for path in sorted((sweep.output / "trials").glob("*/result.json")):
        other = json.loads(path.read_text()).get("metric", sweep.metric)
        check("metric", sweep.metric, other == sweep.metric, f"{other!r}, which {path} has, or in another output")


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


def run_grid(sweep: Sweep, runner: Runner) -> list[Trial]:
    """Train all combinations."""
    trials = grid(sweep)
    with ThreadPoolExecutor(sweep.jobs) as pool:
        _finish(runner, [pool.submit(runner.run, trial) for trial in trials])
    return trials


def run_optuna(sweep: Sweep, runner: Runner) -> list[Trial]:
    """Train as many trials as asked for, each chosen by Optuna from the results of those before it.

    The trials' folders are the memory of the search: what they hold is told to a new study, what was killed is run first.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError(f"sampler={sweep.sampler} needs Optuna: pip install 'glintru_rec[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {each.get_key_element(): distribution_of(each) for each in sweep.searched}
    known = [trial for trial in earlier_trials(sweep) if set(trial.values) == set(spaces)]
    seed = sweep.seed + len(known)  # a search that goes on draws other values than it began with
    liar = {"constant_liar": sweep.jobs > 1}
    sampler = optuna.samplers.TPESampler(seed=seed, **liar) if sweep.sampler == "tpe" else optuna.samplers.RandomSampler(seed)
    study = optuna.create_study(direction=sweep.direction, sampler=sampler)
    trials: list[Trial] = []
    for trial in known:
        result = trial.result()
        chosen = {key: _typed(spaces[key], value) for key, value in trial.values.items()}
        if result is None:
            study.enqueue_trial(chosen)
        else:
            trials.append(trial)
            runner.run(trial)
            study.add_trial(optuna.trial.create_trial(params=chosen, distributions=spaces, value=result["value"]))

    def one() -> None:
        with runner.guard:
            asked = study.ask(spaces)
            trial = trial_of(sweep, {key: str(value) for key, value in asked.params.items()})
            trials.append(trial)
            trial.folder.mkdir(parents=True, exist_ok=True)
            write_json(trial.folder / "values.json", trial.values)
        result = runner.run(trial)
        with runner.guard:
            failed = optuna.trial.TrialState.FAIL
            study.tell(asked, result["value"]) if result else study.tell(asked, state=failed)

    with ThreadPoolExecutor(sweep.jobs) as pool:
        _finish(runner, [pool.submit(one) for _ in range(sweep.trials - len(trials))])
    return list({trial.folder: trial for trial in trials}.values())


def earlier_trials(sweep: Sweep) -> list[Trial]:
    """Find the trials of earlier calls with the same fixed overrides."""
    files = sorted((sweep.output / "trials").glob("*/values.json"), key=lambda file: file.stat().st_mtime_ns)
    found = [trial_of(sweep, json.loads(file.read_text())) for file in files]
    return [trial for trial, file in zip(found, files) if trial.folder == file.parent]


def distribution_of(override: Override) -> Any:
    """Make Optuna's distribution of one of hydra's sweeps."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    log = "log" in value.tags
    if isinstance(value.start, int) and isinstance(value.end, int):
        return IntDistribution(value.start, value.end, log=log)
    return FloatDistribution(value.start, value.end, log=log)


def _typed(distribution: Any, value: str) -> Any:
    kind = type(distribution).__name__
    return value if kind.startswith("Cat") else int(value) if kind.startswith("Int") else float(value)


def _finish(runner: Runner, futures: list) -> None:
    """Wait for all; whatever interrupts this stops the trainings first."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        runner.stop()
        raise


def write_tables(sweep: Sweep, trials: list[Trial], failures: dict[str, str]) -> str:
    """Write ``sweep.json`` and ``sweep.md``; give the latter's text."""
    results = [result for trial in trials if (result := trial.result()) is not None]
    results.sort(key=lambda result: result["value"], reverse=sweep.direction == "maximize")
    keys = [each.get_key_element() for each in sweep.searched]
    header = [*keys, sweep.metric, "", "best epoch", "training, min", "targets/s"]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    for result in results:
        finished = result["finished"]
        seconds, rate = finished.get("train_seconds"), finished.get("targets_per_second")
        rest = [str(finished.get("best_epoch", "")), f"{seconds / 60:.2f}" if seconds else "", f"{rate:,.0f}" if rate else ""]
        lines.append(
            "| "
            + " | ".join([*(result["values"][key] for key in keys), f"{result['value']:.4f}", result["status"], *rest])
            + " |"
        )
    lines += ["", *(f"* failed: {name}: {why}" for name, why in failures.items())]
    if results:
        best = results[0]
        lines += [f"Best on validation: `{' '.join(f'{key}={value}' for key, value in best['values'].items())}`."]
    said = {"metric": sweep.metric, "direction": sweep.direction, "sampler": sweep.sampler, "fixed": sweep.fixed}
    write_json(sweep.output / "sweep.json", {**said, "trials": results, "failures": failures})
    text = "\n".join(lines).strip() + "\n"
    write_text(sweep.output / "sweep.md", text)
    return text


def main() -> int:
    """Read the command line, search, print the table; give the exit status."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sweep = read_command_line(sys.argv[1:])
        first = {each.get_key_element(): _first_value(each) for each in sweep.searched}
        # Before anything starts: a key that no training knows.
        check_arguments([*sweep.fixed, *(f"{key}={value}" for key, value in first.items()), f"output={sweep.output}"])
        with locked(sweep.output, "sweep") as lock:
            check_metric(sweep)
            runner = Runner(sweep, lock)
            trials = (run_grid if sweep.sampler == "grid" else run_optuna)(sweep, runner)
        text = write_tables(sweep, trials, runner.failures)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"\n{text}\nwritten: {sweep.output / 'sweep.md'}, {sweep.output / 'sweep.json'}", flush=True)
    return 1 if runner.failures else 0


def _first_value(override: Override) -> str:
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))


if __name__ == "__main__":
    sys.exit(main())
