"""Write checkpoints while training goes on: copied at once, written aside by a thread, published whole.

A directory gets its name by one rename after every rank has written its part; what a killed run or a full disk left
half-written is named ``.partial-…`` and removed by the next save.
"""

import copy
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.data.id_map import ID_MAP_FILE, IdMap
from glintru_rec.errors import InputError
from glintru_rec.files import publish, write_json
from glintru_rec.memory import give_back_freed
from glintru_rec.training.averaging import WeightAverage
from glintru_rec.training.checkpoint import RunState, folder_of, list_checkpoints, rank_checkpoints, reason_of


@dataclass
class Save:
    """What became of one save on this rank.

    Attributes:
        state: as it was then.
        stalled_seconds: that training waited: for the save before, for the copy, and for the files unless they are written in
            the background.
        write_seconds: that writing the files took.
        error: why there is no checkpoint, in one line; empty if there is one.
    """

    state: RunState
    stalled_seconds: float = 0.0
    write_seconds: float = 0.0
    error: str = ""


class CheckpointWriter:
    """Save a run's checkpoints on all ranks, and drop those no longer kept.

    A checkpoint that cannot be written (disk full) is no reason to stop: the first rank says so on stderr, the `Save` tells
    why, and older checkpoints stay. One save at a time: the next waits for it.

    Args:
        run_dir: the run directory.
        model: its shards are written by the ranks that hold them.
        optimizer: the table's and the dense parameters'.
        average: of the model's weights; saved as the model, with the weights themselves beside it.
        keep_last: number of newest checkpoints to keep.
        keep_best: and of those with the best validation.
        in_background: go on with training once the tensors are copied, which takes as much memory as they do; otherwise once
            they are on the disk.
        timeout_seconds: how long a rank waits for the others to write their part.
        id_map: saved beside the tensors; equal on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        average: WeightAverage | None,
        keep_last: int,
        keep_best: int,
        in_background: bool,
        timeout_seconds: float,
        id_map: IdMap | None = None,
    ):
        self.run_dir, self.model, self.optimizer, self.average = run_dir, model, optimizer, average
        self.keep_last, self.keep_best, self.in_background, self.id_map = keep_last, keep_best, in_background, id_map
        # A group of the thread's own: its collectives must not interleave with those of training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None  # of another rank, not of the disk
        self.ended: list[Save] = []
        self.last: Save | None = None

    def save(self, state: RunState) -> None:
        """Save the weights, and optimizers, of ``state.step``; if they are saved already, only what is said of them anew."""
        start = time.monotonic()
        self.wait()
        save = self.last = Save(copy.copy(state))
        is_new = torch.tensor([int(not folder_of(self.run_dir, state.step).exists())])
        dist.broadcast(is_new, 0)  # all ranks must agree, and the first has published the one before
        tensors = self._copy_tensors() if is_new.item() else None
        id_map = self.id_map.to_table() if is_new.item() and self.id_map is not None and dist.get_rank() == 0 else None
        # A daemon: if training fails meanwhile, the process ends without waiting for ranks that may be gone.
        self.thread = threading.Thread(target=self._write, args=(save, tensors, id_map), name="checkpoint", daemon=True)
        self.thread.start()
        if not self.in_background:
            self.thread.join()
        save.stalled_seconds = time.monotonic() - start

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            RuntimeError: another rank is gone.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            raise self.failure

    def take_saves(self) -> list[Save]:
        """Hand over what became of the saves that have ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def _copy_tensors(self) -> dict[str, Any]:
        give_back_freed()  # as large as the copy, at times, but in pieces that it does not fit into
        with self.average.in_place() if self.average else nullcontext() as weights:
            tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            tensors["training_weights"] = weights or []
            # The average is in the model only until this returns.
            return _copy(tensors) if self.in_background or self.average else tensors

    def _write(self, save: Save, tensors: dict[str, Any] | None, id_map: pa.Table | None) -> None:
        start = time.monotonic()
        if self.model.device.type == "cuda":  # the current device is a thread's own, and copies are waited for on it
            torch.cuda.set_device(self.model.device)
        target = folder_of(self.run_dir, save.state.step)
        partial = target.with_name(f".partial-{target.name}")
        is_first = dist.get_rank() == 0
        try:
            if tensors is not None:
                if is_first:
                    for left in target.parent.glob(".partial-*"):
                        shutil.rmtree(left, ignore_errors=True)
                dist.barrier(self.group)
                dcp.save(tensors, checkpoint_id=partial, process_group=self.group)
            if id_map is not None:
                pq.write_table(id_map, partial / ID_MAP_FILE, compression="zstd")
            if is_first:
                write_json((partial if tensors is not None else target) / "progress.json", asdict(save.state))
                if tensors is not None:
                    publish(partial, target)
        except (CheckpointException, OSError, pa.ArrowException, InputError) as error:  # CheckpointException is no Exception
            save.error = reason_of(error)
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
                good = list_checkpoints(self.run_dir)
                what = f"warning: the checkpoint of step {save.state.step} could not be written ({save.error})"
                print(f"{what}; last good one: {good[-1] if good else 'none yet'}", file=sys.stderr, flush=True)
        except BaseException as error:
            self.failure = error
        else:
            if is_first:
                self._drop_old()
        save.write_seconds = time.monotonic() - start
        self.ended.append(save)

    def _drop_old(self) -> None:
        """Remove what is no longer kept; where that fails, the checkpoint just written is none the worse."""
        try:
            checkpoints = list_checkpoints(self.run_dir)
            kept = {*checkpoints[-self.keep_last :], *rank_checkpoints(checkpoints)[: self.keep_best]}
            for old in set(checkpoints) - kept:
                # Under another name first: what is half removed must not pass for a checkpoint.
                shutil.rmtree(old.rename(old.with_name(f".partial-{old.name}")))
        except (OSError, InputError) as error:
            print(f"warning: old checkpoints could not be removed ({reason_of(error)})", file=sys.stderr, flush=True)


def _copy(value: Any) -> Any:
    """Copy the tensors of a nested state to the CPU, once (torch's own stager copies a shard twice)."""
    if isinstance(value, dict):
        return {key: _copy(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_copy(member) for member in value]
    if isinstance(value, ShardedTensor):
        on_device = any(shard.tensor.is_cuda for shard in value.local_shards())
        return value.cpu() if on_device else copy.deepcopy(value)
    if isinstance(value, DTensor):
        # Not deepcopy: that holds three copies of a shard for a moment.
        return value.to("cpu") if value.is_cuda else value.detach().clone()
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
