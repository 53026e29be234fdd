"""What a model whose vocabulary is dynamic sees of the data: known items alone, by their rows.

An item without a row is left out of histories and targets, as `prepare` leaves out rare items and a scoring job what its
vocabulary lacks: the items around it follow one another.
"""

from collections.abc import Iterator

import numpy as np
import torch

from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import EvalCases, SequenceDataset
from glintru_rec.data.id_map import NO_ROW, IdMap
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.errors import InputError


def known_items(items: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the items that have no row.

    Args:
        items: keys, sequence after sequence, int64 ``[T]``.
        offsets: int64 ``[B + 1]``.
        rows: of each key, int64 ``[U]``.

    Returns:
        The rows of the others, int64 ``[K]``, and their offsets, int64 ``[B + 1]``.
    """
    found = rows[items]
    is_known = found != NO_ROW
    return found[is_known], np.concatenate([[0], np.cumsum(is_known)])[offsets]


def known_batch(batch: Batch, rows: np.ndarray) -> Batch:
    """Make a batch of rows of one of keys; sequences that no two known items are left of are left out."""
    found, offsets = known_items(batch.item_ids.numpy(), batch.offsets.numpy(), rows)
    lengths = np.diff(offsets)
    is_kept = lengths >= 2
    kept = found[np.repeat(is_kept, lengths)]
    return Batch(torch.from_numpy(kept), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[is_kept])])))


class AdmittedDataset:
    """The held-out cases of a dataset, for a model with an id map.

    Args:
        dataset: whose vocabulary gave the map its keys.
        id_map: as it is now.

    Attributes:
        num_items: items admitted.

    Raises:
        InputError: there is none.
    """

    def __init__(self, dataset: SequenceDataset | RowGroupDataset, id_map: IdMap):
        if not id_map.num_items:
            raise InputError(f"no item was seen vocabulary.admit_after={id_map.config.admit_after} times: lower it")
        self.dataset, self.rows, self.num_items = dataset, id_map.rows[: dataset.num_items].copy(), id_map.num_items

    @property
    def num_cases(self) -> int:
        """Number of users that evaluation asks for."""
        return self.dataset.num_cases

    def case_blocks(self, split: str) -> Iterator[EvalCases]:
        """Give the cases of a split as the dataset does: histories of known items, maybe empty; -1 for an unknown target."""
        for cases in self.dataset.case_blocks(split):
            items, offsets = known_items(cases.history_items, cases.history_offsets, self.rows)
            yield EvalCases(items, offsets, self.rows[cases.targets], cases.user_index)

    def train_counts(self) -> np.ndarray:
        """Count the training events of every row in use: int64 ``[num_items]``."""
        counts, is_known = np.zeros(self.num_items, np.int64), self.rows != NO_ROW
        counts[self.rows[is_known]] = self.dataset.train_counts()[is_known]
        return counts
