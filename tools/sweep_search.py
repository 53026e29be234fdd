"""Which trials a search runs: all combinations, or what Optuna asks for."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from sweep_trials import Runner, Sweep, Trial, trial_of

from glintru_rec.errors import InputError
from glintru_rec.files import write_json


def grid(sweep: Sweep) -> list[Trial]:
    """List all combinations, the last key's values next to each other."""
    choices = [list(each.sweep_string_iterator()) for each in sweep.searched]
    keys = [each.get_key_element() for each in sweep.searched]
    return [trial_of(sweep, dict(zip(keys, values))) for values in itertools.product(*choices)]


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
