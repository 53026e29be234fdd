"""Training on a vocabulary that grows and changes under way (``data.vocabulary=dynamic``).

Every rank holds the whole id map, and brings it up to date with what the batches of all ranks hold, before the step that
trains on them: no rank ever disagrees on which row is whose.
"""

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.data.admitted import AdmittedDataset, known_batch
from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.id_map import NO_ROW, IdMap
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.tables.fresh_rows import make_fresh
from glintru_rec.training.checkpoint import RunState
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import join_ids


class DynamicItems:
    """Let batches in: items become rows of the table, or are left out.

    Args:
        config: of the run.
        id_map: whose keys are the dataset's indices; equal on all ranks.
        model: whose table has the map's capacity.
        optimizer: of the model.
    """

    def __init__(self, config: TrainConfig, id_map: IdMap, model: DistributedModelParallel, optimizer: CombinedOptimizer):
        self.config, self.id_map, self.model, self.optimizer = config, id_map, model, optimizer
        self.num_admitted = self.num_evicted = 0  # since the last record, on every rank alike
        self.num_known = self.num_unknown = 0  # items of this rank's batches since then
        self.said = {"admitted": 0, "evicted": 0, "known_events": 0, "unknown_events": 0}  # since the last line, of all ranks

    @property
    def num_items(self) -> int:
        """Rows that negatives and the exact softmax range over: those in use, or one before any is."""
        return max(1, self.id_map.num_items)

    def enter(self, batch: Batch, state: RunState) -> Batch:
        """Take notice of the batches of a step, in the first epoch; give this rank's, in rows, without its unknown items.

        All ranks call it together. Rows of items admitted now are drawn anew, with their optimizer state at 0.
        """
        if state.epoch == 0:
            keys, counts = np.unique(join_ids(batch.item_ids).numpy(), return_counts=True)
            changes = self.id_map.update(keys, counts, state.step)
            self.num_admitted += changes.rows.size
            self.num_evicted += changes.num_evicted
            if changes.rows.size:
                rows, seed = torch.from_numpy(changes.rows), self.config.trainer.seed
                make_fresh(self.model, self.optimizer, rows, self.config.table.init_std, seed, state.step)
        num_known = int((self.id_map.rows[batch.item_ids.numpy()] != NO_ROW).sum())
        self.num_known += num_known
        self.num_unknown += batch.item_ids.numel() - num_known
        return known_batch(batch, self.id_map.rows)

    def collect(self) -> dict[str, int]:
        """Count for a record what came since the last; all ranks call it.

        Returns:
            ``items``, admitted at the moment; ``admitted`` and ``evicted``, since the last call; ``known_events`` and
            ``unknown_events``, items of all ranks' batches that had a row or were left out.
        """
        events = torch.tensor([self.num_known, self.num_unknown])
        dist.all_reduce(events)
        since = dict(zip(self.said, [self.num_admitted, self.num_evicted, *events.tolist()]))
        self.num_admitted = self.num_evicted = self.num_known = self.num_unknown = 0
        self.said = {name: count + since[name] for name, count in self.said.items()}
        return {"items": self.id_map.num_items, **since}

    def describe(self) -> str:
        """Say in a line what came since the last call."""
        said, self.said = self.said, dict.fromkeys(self.said, 0)
        events = said["known_events"] + said["unknown_events"]
        return (
            f"items {self.id_map.num_items:,} of {self.id_map.config.capacity:,}  admitted {said['admitted']:,}  "
            f"evicted {said['evicted']:,}  unknown {said['unknown_events'] / max(1, events):.1%} of {events:,} events"
        )

    def view(self, dataset: SequenceDataset | RowGroupDataset) -> AdmittedDataset:
        """Give a dataset as the model sees it now."""
        return AdmittedDataset(dataset, self.id_map)
