"""The program train."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glintru_rec.data.dataset_files import VOCABULARY_FILE
from glintru_rec.errors import InputError
from glintru_rec.files import write_json, write_text
from glintru_rec.programs.launcher import write_config
from glintru_rec.tables.plan import describe_plan, print_plan
from glintru_rec.training.build import open_dataset
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.mlflow_log import check_loggers, check_reachable
from glintru_rec.training.processes import launch_id, process_group, restart_count
from glintru_rec.training.run_log import describe_versions
from glintru_rec.training.trainer import Stopped, Trainer

# Which launch made the run directory, or went on with it last.
LAUNCH_FILE = ".launch"
# Exit status after SIGTERM or Ctrl-C: saved, to be run again (sysexits.h calls it EX_TEMPFAIL).
STOPPED = 75


def train(config: TrainConfig) -> int:
    """Train into the run directory ``config.output``; give the exit status: 0, or `STOPPED` where a signal ended it early.

    A restart by torchelastic goes on where the run was; so does a new start with ``trainer.resume=true``.
    """
    check_loggers(config.logging)
    run_dir = Path(config.output)
    resume = config.trainer.resume or restarted(run_dir)
    dataset = open_dataset(config)
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as device:
        check_free(run_dir, resume)
        check_reachable(config.logging)
        trainer = Trainer(config, dataset, device)
        if resume:
            trainer.resume()
        # Written only now: what trainer or checkpoint refuse leaves no trace.
        if dist.get_rank() == 0:
            plan = describe_plan(trainer.model, config.table)
            start(run_dir, config)
            if not config.dynamic:  # otherwise checkpoints say what the rows of the item table mean
                (run_dir / VOCABULARY_FILE).parent.mkdir(exist_ok=True)
                dataset.vocabulary.save(run_dir / VOCABULARY_FILE)
            dataset.side.save(run_dir)
            write_json(run_dir / "plan.json", plan)
            print_plan(plan)
        dist.barrier()
        try:
            state = trainer.fit()
        except Stopped as stopped:
            if dist.get_rank() == 0:
                print(stopped, flush=True)
            return STOPPED
        if dist.get_rank() == 0:
            print(f"done: {state.step} steps; best ndcg@10 {state.best_value:.4f} (valid) at step {state.best_step}; {run_dir}")
    return 0


def restarted(run_dir: Path) -> bool:
    """Whether torchelastic restarted this very launch, after it had made the run directory."""
    launch = run_dir / LAUNCH_FILE
    return restart_count() > 0 and launch.is_file() and launch.read_text() == launch_id()


def check_free(run_dir: Path, resume: bool) -> None:
    """Refuse, on all ranks, a run directory that holds anything, unless the run in it goes on."""
    held = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else [run_dir.name] if run_dir.exists() else []
    # What a launch that was killed at its very start left is nothing: its mark, or files that never got their names.
    taken = torch.tensor([int(any(name != LAUNCH_FILE and not name.startswith(".partial-") for name in held))])
    dist.broadcast(taken, 0)
    if taken.item() and resume and not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"output={run_dir} holds no run to go on with (no config.yaml in it), but is not empty: choose another"
        )
    if taken.item() and not resume:
        raise InputError(f"output={run_dir} is not empty: choose another, or go on with the run in it by trainer.resume=true")


def start(run_dir: Path, config: Any) -> None:
    """Write what a run directory holds from the start."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={run_dir} cannot be made: {error}") from error
    write_text(run_dir / LAUNCH_FILE, launch_id())
    write_config(config, run_dir / "config.yaml")
    write_json(run_dir / "versions.json", describe_versions())
