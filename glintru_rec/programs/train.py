"""The program train."""

from pathlib import Path

import torch
import torch.distributed as dist

from glintru_rec.data.dataset import VOCABULARY_FILE, SequenceDataset
from glintru_rec.errors import InputError
from glintru_rec.files import write_json
from glintru_rec.programs.launcher import write_config
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group, restart_count
from glintru_rec.training.run_log import describe_versions
from glintru_rec.training.trainer import Trainer


def train(config: TrainConfig) -> None:
    """Train into the run directory ``config.output``.

    A restart by torchelastic goes on where the run was; so does a new start with ``trainer.resume=true``.
    """
    run_dir = Path(config.output)
    resume = config.trainer.resume or restart_count() > 0
    dataset = SequenceDataset.open(config.data.path)
    with process_group(config.trainer.device) as device:
        _claim(run_dir, resume)
        if dist.get_rank() == 0:
            write_config(config, run_dir / "config.yaml")
            write_json(run_dir / "versions.json", describe_versions())
            (run_dir / VOCABULARY_FILE).parent.mkdir(exist_ok=True)
            dataset.vocabulary.save(run_dir / VOCABULARY_FILE)  # what the rows of the item table mean
        trainer = Trainer(config, dataset, device)
        if resume:
            trainer.resume()
        state = trainer.fit()
        if dist.get_rank() == 0:
            print(f"done: {state.step} steps; best ndcg@10 {state.best_value:.4f} (valid) at step {state.best_step}; {run_dir}")


def _claim(run_dir: Path, resume: bool) -> None:
    """Make the run directory; all ranks refuse one that holds anything, unless the run in it goes on."""
    taken = run_dir.is_dir() and any(run_dir.iterdir())
    in_use = torch.tensor([int(taken)])
    dist.broadcast(in_use, 0)  # rank 0 may have made it already when another rank looks
    if in_use.item() and not resume:
        raise InputError(f"output={run_dir} is not empty: choose another, or go on with the run in it by trainer.resume=true")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={run_dir} cannot be made: {error}") from error
