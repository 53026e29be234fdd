"""What the steps between two lines of the log came to: mean loss, speed, slow ranks, and whether a loss went bad."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from glintru_rec.data.batches import TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.reader import RowGroupBatches
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.training.checkpoint import list_checkpoints, read_state
from glintru_rec.training.rank_meter import RankMeter, describe_lag

# Greater than the number of any step.
NEVER = 2**62
# Users and items that are named of a batch whose loss is bad.
NUM_NAMED = 5
SECONDS_BETWEEN_LAGS = 60.0


class BadLoss(NamedTuple):
    """The first batch whose loss is not finite, or too high."""

    steps_ago: int
    """Steps since; 0 for the last one."""
    rank: int
    """That had the batch."""
    number: int
    """Of the batch in its epoch."""
    given: tuple[int, ...]
    """What the reader on that rank looks it up by."""


class Monitor:
    """Take in the losses of this rank's steps; nothing waits for the device until all ranks collect.

    Args:
        meter: of this rank's own speed.
        max_loss: a batch whose mean loss is above it is bad; 0: no limit.
        device: of the losses.
    """

    def __init__(self, meter: RankMeter, max_loss: float, device: torch.device):
        self.meter, self.max_loss = meter, max_loss or math.inf
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=device)
        self.first_bad = torch.tensor(NEVER, device=device)  # place of the step in ``steps``, and the rank
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.since, self.lag_said = time.monotonic(), -math.inf

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it was no training."""
        self.since = time.monotonic()

    def add(self, sums: Tensor, batches_before: int, given: tuple[int, ...]) -> None:
        """Take in a step.

        Args:
            sums: of this rank's losses, and number of its targets, float64 ``[2]``.
            batches_before: batches of the epoch that were done before the step.
            given: what `RowGroupBatches.look_up` or `TrainingBatches.look_up` finds this rank's batch by.
        """
        place = len(self.steps) * self.world_size + self.rank
        self.steps.append((batches_before, given))
        self.loss_sum += sums
        loss, count = sums
        is_bad = ~loss.isfinite() | (loss > self.max_loss * count)
        self.first_bad = torch.where(is_bad, self.first_bad.clamp(max=place), self.first_bad)

    def find_bad_loss(self) -> BadLoss | None:
        """Find the first bad batch of all ranks since the last call of `collect`; all ranks call it."""
        dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        first_bad = int(self.first_bad)
        if first_bad == NEVER:
            return None
        step, rank = divmod(first_bad, self.world_size)
        batches_before, given = self.steps[step]
        return BadLoss(len(self.steps) - 1 - step, rank, batches_before + rank, given)

    def collect(self) -> dict[str, Any] | None:
        """Sum up the steps of all ranks since the last call, and say if a rank lags; all ranks call it.

        Returns:
            Mean ``loss``, ``targets_per_second``, ``seconds``, ``num_targets`` and the figures of `RankMeter.collect`; None
            without targets.
        """
        own_targets = float(self.loss_sum[1])
        dist.all_reduce(self.loss_sum)
        total, count = self.loss_sum.tolist()
        self.loss_sum.zero_()
        self.steps = []
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        if not count:
            return None
        ranks = self.meter.collect(own_targets)
        self._warn_of_lag(ranks["rank_seconds"], ranks["rank_targets_per_second"])
        figures = {"loss": total / count, "targets_per_second": count / seconds}
        return {**figures, "seconds": seconds, "num_targets": int(count), **ranks}

    def _warn_of_lag(self, seconds: list[float], rates: list[float]) -> None:
        lag = describe_lag(seconds, rates)
        if lag and self.rank == 0 and time.monotonic() - self.lag_said >= SECONDS_BETWEEN_LAGS:
            self.lag_said = time.monotonic()
            print(lag, file=sys.stderr, flush=True)


def name_batch(
    bad: BadLoss, batches: TrainingBatches | RowGroupBatches, dataset: SequenceDataset | RowGroupDataset, epoch: int
) -> str:
    """Name some users and items of a bad batch; all ranks call it, and the one that had the batch looks."""
    found = [""]
    if dist.get_rank() == bad.rank:
        batch, places = batches.look_up(epoch, *bad.given)
        places, items = np.unique(places), batch.item_ids.unique().numpy()
        users = _name_some(dataset.users_at(places[:NUM_NAMED]), places.size)
        assert batch.ids is not None, "readers give them"
        named = batch.ids.take(pa.array(items[:NUM_NAMED])).to_pylist()
        found = [f"users {users} and items {_name_some(named, items.size)}"]
    dist.broadcast_object_list(found, src=bad.rank, device=torch.device("cpu"))
    return found[0]


def describe_checkpoints(run_dir: Path, bad_step: int) -> str:
    """Say which checkpoint to go on from after the loss of a step went bad, and which not."""
    checkpoints = list_checkpoints(run_dir)
    good = [checkpoint for checkpoint in checkpoints if read_state(checkpoint).step < bad_step - 1]
    spoilt = [str(checkpoint) for checkpoint in checkpoints if checkpoint not in good]  # the loss is of these weights
    return f"last good checkpoint: {good[-1] if good else 'there is none yet'}" + (
        f"; do not go on from {', '.join(spoilt)}" if spoilt else ""
    )


def _name_some(named: Sequence, number: int) -> str:
    more = f" and {number - NUM_NAMED} more" if number > NUM_NAMED else ""
    return ", ".join(map(repr, named)) + more
