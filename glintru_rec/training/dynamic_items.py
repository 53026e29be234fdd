"""Training on a vocabulary that grows and changes under way (``data.vocabulary=dynamic``).

Every rank holds the whole id map, and brings it up to date with what the batches of all ranks hold, before the step that
trains on them: no rank ever disagrees on which row is whose.
"""

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.data.admitted import AdmittedDataset, known_batch
from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.id_map import NO_ROW, Changes, IdMap
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.tables.fresh_rows import make_fresh
from glintru_rec.training.checkpoint import RunState
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import join_ids, sum_counts


class DynamicItems:
    """Let batches in: items become rows of the table, or are left out.

    Args:
        config: of the run.
        id_map: of the dataset's type of ids; equal on all ranks.
        model: whose table has the map's capacity.
        optimizer: of the model.
    """

    def __init__(self, config: TrainConfig, id_map: IdMap, model: DistributedModelParallel, optimizer: CombinedOptimizer):
        self.config, self.id_map, self.model, self.optimizer = config, id_map, model, optimizer
        self.num_admitted = self.num_evicted = 0  # since the last record, on every rank alike
        self.events = np.zeros(3, np.int64)  # items of this rank's batches since then: known, unknown, of the latter colliding
        names = ("admitted", "evicted", "known_events", "unknown_events", "colliding_events")
        self.said = dict.fromkeys(names, 0)  # since the last line, of all ranks

    @property
    def num_items(self) -> int:
        """Rows that negatives and the exact softmax range over: those in use, or one before any is."""
        return max(1, self.id_map.num_items)

    def enter(self, batch: Batch, state: RunState) -> Batch:
        """Take notice of the batches of a step, in the first epoch; give this rank's, in rows, without its unknown items.

        All ranks call it together. Rows of items admitted now are drawn anew, with their optimizer state at 0.
        """
        assert batch.ids is not None, "readers give them"
        places, place_of = np.unique(batch.item_ids.numpy(), return_inverse=True)
        ids = batch.ids.take(pa.array(places))
        keys = self.id_map.keys_of(ids)
        if state.epoch == 0:
            self._count(ids, keys, place_of, state)
        found = self.id_map.find(ids, keys)
        rows, collides = found.rows[place_of], found.collides[place_of]
        is_known = rows != NO_ROW
        self.events += (is_known.sum(), (~is_known).sum(), collides.sum())
        return known_batch(rows, batch.offsets.numpy())

    def _count(self, ids: pa.Array, keys: np.ndarray, place_of: np.ndarray, state: RunState) -> None:
        """Take notice of what all ranks' batches hold: of this rank's the ids, their keys, and each event's place in these."""
        is_told_apart = ~self.id_map.find(ids, keys).collides
        seen = keys[place_of[is_told_apart[place_of]]]
        changes = self.id_map.update(*np.unique(join_ids(torch.from_numpy(seen)).numpy(), return_counts=True), state.step)
        self.num_admitted += changes.rows.size
        self.num_evicted += changes.num_evicted
        if changes.rows.size:
            rows, seed = torch.from_numpy(changes.rows), self.config.trainer.seed
            make_fresh(self.model, self.optimizer, rows, self.config.table.init_std, seed, state.step)
            if self.id_map.id_type == "string":
                self._name(changes, ids.filter(pa.array(is_told_apart)), keys[is_told_apart])

    def _name(self, changes: Changes, ids: pa.Array, keys: np.ndarray) -> None:
        """Give the map the strings of those that were admitted, from the ranks that have seen them: the first one's."""
        own = np.isin(keys, self.id_map.keys[changes.rows])
        told: list[list[tuple[int, str]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(told, list(zip(keys[own].tolist(), ids.filter(pa.array(own)).to_pylist(), strict=True)))
        names = dict(reversed([each for rank in told for each in rank]))  # the first that is told is the last that is noted
        self.id_map.name(changes.rows, pa.array([names[key] for key in self.id_map.keys[changes.rows].tolist()]))

    def collect(self) -> dict[str, int]:
        """Count for a record what came since the last; all ranks call it.

        Returns:
            ``items``, admitted at the moment; ``admitted`` and ``evicted``, since the last call; ``known_events`` and
            ``unknown_events``, items of all ranks' batches that had a row or were left out; ``colliding_events``, those left
            out because another item with the same hash has a row.
        """
        events = sum_counts(self.events)
        since = dict(zip(self.said, [self.num_admitted, self.num_evicted, *events.tolist()], strict=True))
        self.num_admitted = self.num_evicted = 0
        self.events = np.zeros_like(events)
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
