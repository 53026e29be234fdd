"""Checkpoints of a run: written aside, published whole, found again.

::

    RUN_DIR/checkpoints/step-00001200/   torch.distributed.checkpoint files and progress.json

A directory gets its name by one rename after every rank has written its part, so what bears the name ``step-…`` is
whole; what a killed run left half-written is named ``.partial-…`` and removed by the next save.
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.errors import InputError
from glintru_rec.files import publish, write_json
from glintru_rec.model import SequenceModel
from glintru_rec.tables.sharding import materialize_state
from glintru_rec.training.averaging import WeightAverage


@dataclass
class RunState:
    """Where a run stands. Batches and randomness follow from it and the seed.

    Attributes:
        model_fingerprint: of the config that the tensors belong to.
        vocabulary_sha256: of the dataset that the item table belongs to.
        batching: fingerprint of all that decides an epoch's batches; with another one, an epoch under way starts anew.
        step: optimizer steps done.
        epoch: epoch under way, from 0.
        step_in_epoch: steps of it done.
        best_step: step of the best validation; -1 before the first.
        best_value: its NDCG@10.
        validations_since_best: for early stopping.
        validated_step: step of the last validation; -1 before the first.
        averaged: whether the checkpoint's model is an average of weights; those that training goes on with lie beside it.
    """

    model_fingerprint: str
    vocabulary_sha256: str
    batching: str
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_step: int = -1
    best_value: float = 0.0
    validations_since_best: int = 0
    validated_step: int = -1
    averaged: bool = False


def save_checkpoint(
    run_dir: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    average: WeightAverage | None,
    state: RunState,
    keep_last: int,
) -> Path:
    """Write a checkpoint on all ranks, publish it, and drop those no longer kept.

    Args:
        run_dir: the run directory.
        model: its shards are written by the ranks that hold them.
        optimizer: the table's and the dense parameters'.
        average: of the model's weights; saved as the model, with the weights themselves beside it.
        state: written beside the tensors; its ``best_step`` is always kept.
        keep_last: number of newest checkpoints to keep.
    """
    folder = run_dir / "checkpoints"
    target = _folder_of(run_dir, state.step)
    partial = folder / f".partial-{target.name}"
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    is_new = not target.exists()  # the tensors of a step are written once; what is said of them may change
    if is_new:
        with average.in_place() if average else nullcontext() as weights:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "training_weights": weights or []}
            dcp.save(tensors, checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        write_json((partial if is_new else target) / "progress.json", asdict(state))
        if is_new:
            publish(partial, target)
        best = _folder_of(run_dir, state.best_step)
        for old in list_checkpoints(run_dir)[:-keep_last]:
            if old != best:
                shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(
    checkpoint: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Fill a model on all ranks from a checkpoint; to go on with training, the optimizer and the average too.

    Raises:
        InputError: it cannot be read, or holds tensors of other names or shapes.
    """
    tensors: dict = {"model": model.state_dict()}
    if optimizer is not None:
        materialize_state(optimizer)
        tensors["optimizer"] = optimizer.state_dict()
    if average is not None:
        tensors["training_weights"] = average.average
    _load(tensors, checkpoint)
    model.load_state_dict(tensors["model"])
    if optimizer is not None:
        optimizer.load_state_dict(tensors["optimizer"])
    if average is not None:
        average.swap()


def load_plain(checkpoint: Path, model: SequenceModel) -> None:
    """Fill an unsharded model in this process alone, with no process group."""
    tensors = {"model": model.state_dict()}
    _load(tensors, checkpoint, no_dist=True)
    model.load_state_dict(tensors["model"])


def _load(tensors: dict, checkpoint: Path, **options) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint, **options)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:  # CheckpointException is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = " ".join(str(cause).split())[:300]
        raise InputError(f"checkpoint {checkpoint} cannot be loaded into this model: {reason}") from error


def read_state(checkpoint: Path) -> RunState:
    """Read where the run stood at a checkpoint.

    Raises:
        InputError: not a whole checkpoint.
    """
    try:
        return RunState(**json.loads((checkpoint / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: {error}") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def best_checkpoint(run_dir: Path) -> Path:
    """Find the checkpoint with the best validation, or the newest of a run that never validated.

    Raises:
        InputError: no run directory, or no checkpoint in it.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"checkpoint={run_dir} is not a run directory: it has no config.yaml")
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise InputError(f"checkpoint={run_dir} holds no whole checkpoint")
    best_step = read_state(checkpoints[-1]).best_step
    best = checkpoints[-1] if best_step < 0 else _folder_of(run_dir, best_step)
    if best not in checkpoints:
        raise InputError(f"{checkpoints[-1]} says that step {best_step} is the best, but {best} is not there")
    return best


def _folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"
