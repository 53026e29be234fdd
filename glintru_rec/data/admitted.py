"""What a model whose vocabulary is dynamic sees of the data: known items alone, by their rows.

An item without a row is left out of histories and targets, as `prepare` leaves out rare items and a scoring job what its
vocabulary lacks: the items around it follow one another.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import EvalCases, SequenceDataset
from glintru_rec.data.id_map import NO_ROW, IdMap
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.errors import InputError

# Ids that are looked up at a time: a dataset in memory may have many.
_IDS_AT_ONCE = 1 << 16


def known_items(rows: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the items that have no row.

    Args:
        rows: of the items, sequence after sequence, `NO_ROW` for some, int64 ``[T]``.
        offsets: int64 ``[B + 1]``.

    Returns:
        The rows of the others, int64 ``[K]``, and their offsets, int64 ``[B + 1]``.
    """
    is_known = rows != NO_ROW
    return rows[is_known], np.concatenate([[0], np.cumsum(is_known)])[offsets]


def known_batch(rows: np.ndarray, offsets: np.ndarray) -> Batch:
    """Make a batch of known items (see `known_items`); sequences that no two of them are left of are left out."""
    found, offsets = known_items(rows, offsets)
    lengths = np.diff(offsets)
    is_kept = lengths >= 2
    kept = found[np.repeat(is_kept, lengths)]
    return Batch(torch.from_numpy(kept), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[is_kept])])))


class AdmittedDataset:
    """The held-out cases of a dataset, for a model with an id map.

    Args:
        dataset: of raw ids, or any other.
        id_map: as it is now; it must stay so.

    Attributes:
        num_items: items admitted.

    Raises:
        InputError: there is none.
    """

    def __init__(self, dataset: SequenceDataset | RowGroupDataset, id_map: IdMap):
        if not id_map.num_items:
            raise InputError(
                f"no item was seen vocabulary.admit_after={id_map.config.admit_after} times: lower it, or raise "
                f"vocabulary.candidates"
            )
        self.dataset, self.id_map, self.num_items = dataset, id_map, id_map.num_items
        self._found: tuple[pa.Array, np.ndarray] | None = None  # the ids looked up last, and their rows

    @property
    def num_cases(self) -> int:
        """Number of users that evaluation asks for."""
        return self.dataset.num_cases

    def case_blocks(self, split: str) -> Iterator[EvalCases]:
        """Give the cases of a split as the dataset does: histories of known items, maybe empty; -1 for an unknown target."""
        for cases in self.dataset.case_blocks(split):
            assert cases.ids is not None, "a dataset gives them"
            rows = self._rows_of(cases.ids)
            items, offsets = known_items(rows[cases.history_items], cases.history_offsets)
            yield EvalCases(items, offsets, rows[cases.targets], cases.user_index)

    def train_counts(self) -> np.ndarray:
        """Count the training events of every row in use: int64 ``[num_items]``."""
        counts = np.zeros(self.num_items, np.int64)
        for block in self.dataset.train_blocks():
            rows = self._rows_of(block.vocabulary.item_ids)
            counts[rows[rows != NO_ROW]] += block.train_counts()[rows != NO_ROW]
        return counts

    def _rows_of(self, ids: pa.Array) -> np.ndarray:
        """Look up ids, each once: their rows, int64 ``[N]``."""
        if self._found is None or self._found[0] is not ids:  # all blocks of a dataset with a vocabulary have all its ids
            starts = range(0, len(ids), _IDS_AT_ONCE)
            rows = [np.zeros(0, np.int64), *(self.id_map.find(ids.slice(at, _IDS_AT_ONCE)).rows for at in starts)]
            self._found = ids, np.concatenate(rows)
        return self._found[1]
