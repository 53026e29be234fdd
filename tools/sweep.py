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

import json
import signal
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from leaderboard import locked
from sweep_search import run_grid, run_optuna
from sweep_trials import Runner, Sweep, Trial, check_arguments

from glintru_rec.config import check, telling_part
from glintru_rec.errors import InputError
from glintru_rec.files import write_json, write_text


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
        raise InputError(telling_part(error)) from error
    searched = [each for each in parsed if each.is_sweep_override()]
    fixed = [each.input_line for each in parsed if not each.is_sweep_override()]
    return Sweep(**{**own, "output": Path(own["output"])}, fixed=fixed, searched=searched)


def check_metric(sweep: Sweep) -> None:
    """Raise an `InputError` where the results of earlier calls are figures of another metric."""
    for path in sorted((sweep.output / "trials").glob("*/result.json")):
        other = json.loads(path.read_text()).get("metric", sweep.metric)
        check("metric", sweep.metric, other == sweep.metric, f"{other!r}, which {path} has, or in another output")


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
