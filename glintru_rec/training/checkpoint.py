"""Checkpoints of a run: where it stood, and how they are found and read. `checkpoint_writer` writes them.

::

    RUN_DIR/checkpoints/step-00001200/   torch.distributed.checkpoint files, progress.json, and id_map.parquet where the
                                         vocabulary is dynamic

What bears the name ``step-…`` is whole.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.data.batches import Place
from glintru_rec.errors import InputError
from glintru_rec.tables.sharding import TABLE_KEY, materialize_state
from glintru_rec.training.averaging import WeightAverage
from glintru_rec.training.checkpoint_reader import GrowingPlanner, InertPlanner, InertReader


@dataclass
class RunState:
    """Where a run stands. Batches and randomness follow from it and the seed.

    Attributes:
        model_fingerprint: of the config that the tensors belong to.
        vocabulary_sha256: of the dataset that the item table belongs to; where that has raw ids, of its sequences.
        batching: fingerprint of all that decides the order in which an epoch is read.
        step: optimizer steps done.
        epoch: epoch under way, from 0.
        batches_in_epoch: batches of it that are done, of all ranks together.
        chunks_begun: the chunks of it that are read in part: of each its number, how many of its windows are done, and how
            many there are; with ``data.reader=memory`` all is one chunk. Those of ranks 0, 1, … come first; null for a rank
            without one.
        next_chunk: and the first that nobody has begun.
        best_step: step of the best validation; -1 before the first.
        best_value: its figure, of which more is better: NDCG@10; of a ranking model, the first task's.
        validations_since_best: without a better figure, of those that patience counts; for early stopping.
        validated_step: step of the last validation; -1 before the first.
        value: the figure of the weights of this very step; None while they are not validated.
        averaged: whether the checkpoint's model is an average of weights; those that training goes on with lie beside it.
        dynamic: whether an id map says which item has which row (``data.vocabulary``); it lies beside the tensors.
    """

    model_fingerprint: str
    vocabulary_sha256: str
    batching: str
    step: int = 0
    epoch: int = 0
    batches_in_epoch: int = 0
    chunks_begun: Sequence[Any] = ()
    next_chunk: int = 0
    best_step: int = -1
    best_value: float = 0.0
    validations_since_best: int = 0
    validated_step: int = -1
    value: float | None = None
    averaged: bool = False
    dynamic: bool = False

    @property
    def place(self) -> Place:
        """How far the epoch under way is done."""
        return Place(self.batches_in_epoch, self.chunks_begun, self.next_chunk)

    @place.setter
    def place(self, place: Place) -> None:
        self.batches_in_epoch, self.chunks_begun, self.next_chunk = place

    def note_validation(self, value: float, counts: bool = True) -> None:
        """Note the figure that validation gave the weights of this step, and if it ``counts`` for patience."""
        self.value, self.validated_step = value, self.step
        if value > self.best_value or self.best_step < 0:
            self.best_step, self.best_value, self.validations_since_best = self.step, value, 0
        else:
            self.validations_since_best += counts

    @property
    def is_best(self) -> bool:
        """Whether the weights of this step have the best validation so far."""
        return self.best_step == self.step

    def has_stalled(self, patience: int) -> bool:
        """Whether ``patience`` validations, or more, brought nothing better; never with a patience of 0."""
        return 0 < patience <= self.validations_since_best


def load_checkpoint(
    checkpoint: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer | None = None,
    average: WeightAverage | None = None,
    may_grow: bool = False,
) -> None:
    """Fill a model on all ranks from a checkpoint; to go on with training, the optimizer and the average too.

    Args:
        checkpoint: its folder.
        model: to fill.
        optimizer: to fill; None for weights alone.
        average: to fill.
        may_grow: the item table may have more rows than the checkpoint's; the others stay as they are.

    Raises:
        InputError: it cannot be read, or holds tensors of other names or shapes.
    """
    tensors: dict = {"model": model.state_dict()}
    if optimizer is not None:
        materialize_state(optimizer)
        tensors["optimizer"] = optimizer.state_dict()
    if average is not None:
        tensors["training_weights"] = average.average
    _load(tensors, checkpoint, GrowingPlanner(f"model.{TABLE_KEY}") if may_grow else InertPlanner())
    model.load_state_dict(tensors["model"])
    if optimizer is not None:
        optimizer.load_state_dict(tensors["optimizer"])
    if average is not None:
        average.swap()


def load_plain(checkpoint: Path, model: nn.Module) -> None:
    """Fill an unsharded model in this process alone, with no process group."""
    tensors = {"model": model.state_dict()}
    _load(tensors, checkpoint, InertPlanner(), no_dist=True)
    model.load_state_dict(tensors["model"])


def _load(tensors: dict, checkpoint: Path, planner: InertPlanner, **options) -> None:
    try:
        dcp.load(tensors, storage_reader=InertReader(checkpoint), planner=planner, **options)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:  # CheckpointException is no Exception
        raise InputError(f"checkpoint {checkpoint} cannot be loaded into this model: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Say in one line why reading or writing failed: on the first rank that did, where several ranks were at it."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return " ".join(str(cause).split())[:300]


def read_state(checkpoint: Path) -> RunState:
    """Read where the run stood at a checkpoint.

    Raises:
        InputError: not a whole checkpoint.
    """
    try:
        fields = json.loads((checkpoint / "progress.json").read_text())
        if "step_in_epoch" in fields:  # an older version, which counted steps
            fields["batches_in_epoch"] = fields.pop("step_in_epoch")
            fields["value"] = fields["best_value"] if fields["best_step"] == fields["step"] else None
        return RunState(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: {error}") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint of a run, if there is one."""
    return next(reversed(list_checkpoints(run_dir)), None)


def find_resumable(run_dir: Path, model_fingerprint: str) -> tuple[Path, RunState] | None:
    """Find the newest checkpoint of a run on all ranks, and where it stood; None: there is none.

    Raises:
        InputError: it is of a model with another fingerprint, or not whole.
    """
    newest = from_first_rank(lambda: newest_checkpoint(run_dir))
    if newest is None:
        return None
    state = read_state(newest)
    if state.model_fingerprint != model_fingerprint:
        raise InputError(f"{newest} was written by another model; resume with its config, or choose another output")
    return newest, state


def from_first_rank(choose: Callable[[], Path | None]) -> Path | None:
    """Give all ranks the checkpoint that the first one finds.

    A run directory may change while they look, or lie on a file system that shows them different states of it.

    Raises:
        InputError: what ``choose`` raised on the first rank, on all.
    """
    found: list[Path | InputError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [choose()]
        except InputError as error:
            found = [error]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def best_checkpoint(run_dir: Path) -> Path:
    """Find the checkpoint with the best validation, or the newest where none was validated.

    Raises:
        InputError: no run directory, or no checkpoint in it.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"checkpoint={run_dir} is not a run directory: it has no config.yaml")
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise InputError(f"checkpoint={run_dir} holds no whole checkpoint")
    return next(iter(rank_checkpoints(checkpoints)), checkpoints[-1])


def rank_checkpoints(checkpoints: list[Path]) -> list[Path]:
    """Order those that were validated by their figures, best first; of equal ones the older is the better."""
    values = [(read_state(checkpoint).value, checkpoint) for checkpoint in checkpoints]
    validated = [(-value, checkpoint) for value, checkpoint in values if value is not None]
    return [checkpoint for _, checkpoint in sorted(validated)]


def folder_of(run_dir: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"
