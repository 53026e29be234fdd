"""A dynamic vocabulary: which item has which row of the item table, while items come and go.

An id that is seen is counted. One seen ``admit_after`` times is due, and is admitted if a row is free, or if it has been seen
more than ``evict_ratio`` times as often as the least useful item admitted, which then gives its row up: the one seen the
fewest times, of these the one not seen for longest, of these that with the smallest row::

    seen --count >= admit_after--> due --a row is free----------------------------------> admitted
                                    +----count > evict_ratio · least useful one's count--> admitted, to that one's row

Everything follows from what was seen in which step, so that ranks which see the same keep equal maps.

Shapes: U ids that may be seen, each with a key, its place among them; N keys of a step.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.config import check
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

ID_MAP_FILE = "id_map.parquet"
NO_ROW = -1
_COLUMNS = ("item_id", "row", "count", "last_seen")
# Least useful items that one pass over all rows finds; the next steps look among these alone.
_POOL = 1 << 16


@dataclass
class VocabularyConfig:
    """Which items have rows, with ``data.vocabulary=dynamic``.

    Attributes:
        capacity: rows of the item table, the most items that are known at a time; the same in a run that starts from another
            (``trainer.init_from``).
        admit_after: an item is admitted once it has been seen this often. The first epoch of a run counts what its batches hold
            (the item where a history longer than ``data.max_seq_len`` is cut, twice); later epochs repeat its events and count
            none, so that the vocabulary then stands still.
        evict_ratio: once all rows are taken, a new item takes the row of the least useful one if it has been seen more than
            this many times as often. At 1, items of nearly equal counts take each other's rows, and begin anew each time.
        decay: what all counts are multiplied by, and rounded down, where a run starts from another: 1 forgets nothing, with
            0.5 what was seen a run earlier counts half.
    """

    capacity: int = 0
    admit_after: int = 5
    evict_ratio: float = 2.0
    decay: float = 0.5

    def __post_init__(self):
        check("vocabulary.capacity", self.capacity, self.capacity >= 0, "at least 1, or 0 with data.vocabulary=dense")
        check("vocabulary.admit_after", self.admit_after, self.admit_after >= 1, "at least 1")
        finite = 1 <= self.evict_ratio < math.inf
        check("vocabulary.evict_ratio", self.evict_ratio, finite, "at least 1 and finite")
        check("vocabulary.decay", self.decay, 0 <= self.decay <= 1, "from 0 to 1")


class Changes(NamedTuple):
    """What a step changed."""

    rows: np.ndarray
    """Rows that went to items admitted now, each once, int64 ``[A]``."""
    num_evicted: int
    """How many of them other items had to give up."""


class IdMap:
    """Count ids, and give the most frequent of them rows.

    An item keeps its row as long as it is admitted. Rows ``0 .. num_items - 1`` are in use, those behind never were. An item
    that lost its row keeps its count, and is due again when it is seen again.

    Args:
        vocabulary: the ids that a dataset has, whose indices are their keys; its counts are not looked at.
        config: how many are admitted, and when.

    Attributes:
        rows: row of each key, `NO_ROW` for one that is not admitted, int64 ``[U]``.
        counts: how often each has been seen, int64 ``[U]``.
        last_seen: the step when each was seen last; negative: in an earlier run. int64 ``[U]``.
        keys: the key that has each row, int64 ``[capacity]``; meaningless from ``num_items`` on.
        num_items: items admitted.
    """

    def __init__(self, vocabulary: Vocabulary, config: VocabularyConfig):
        self.vocabulary, self.config = vocabulary, config
        self._set_ids(vocabulary.item_ids)

    def _set_ids(self, item_ids: pa.Array) -> None:
        """Begin with ids of which none has been seen."""
        self.item_ids = item_ids
        self.rows = np.full(len(item_ids), NO_ROW)
        self.counts, self.last_seen = np.zeros((2, len(item_ids)), np.int64)
        self.keys = np.zeros(self.config.capacity, np.int64)
        self.num_items = 0
        # Holds the rows of all items whose (count, last step) is at most the bound. That stays true by itself: both only grow,
        # and rows change hands to more frequent items.
        self._pool, self._bound = np.zeros(0, np.int64), (0, 0)

    def update(self, keys: np.ndarray, counts: np.ndarray, step: int) -> Changes:
        """Count what a step has seen, admit what is due.

        Of those that are due, the one seen most often comes first, of equal ones that of the smallest key. While rows are free,
        it gets the next one.

        Args:
            keys: distinct, ascending, int64 ``[N]``.
            counts: how often the step holds each, at least 1, int64 ``[N]``.
            step: greater than at the last call.
        """
        self.counts[keys] += counts
        self.last_seen[keys] = step
        due = keys[(self.rows[keys] == NO_ROW) & (self.counts[keys] >= self.config.admit_after)]
        due = due[np.argsort(-self.counts[due], kind="stable")]
        free = np.arange(self.num_items, min(self.num_items + due.size, self.config.capacity))
        self.rows[due[: free.size]], self.keys[free] = free, due[: free.size]
        self.num_items += free.size
        waiting = due[free.size :]
        taken = self._least_useful(min(waiting.size, self.num_items)) if waiting.size else free[:0]
        # The first that is due is held against the least useful item, the second against the next: once one loses, so do all.
        waiting, evicted = waiting[: taken.size], self.keys[taken]
        is_better = self.counts[waiting] > self.config.evict_ratio * self.counts[evicted]
        waiting, evicted, taken = waiting[is_better], evicted[is_better], taken[is_better]
        self.rows[evicted], self.rows[waiting], self.keys[taken] = NO_ROW, taken, waiting
        return Changes(np.concatenate([free, taken]), taken.size)

    def _least_useful(self, num: int) -> np.ndarray:
        """Find the rows of the least useful items, the least first; all rows are in use."""
        rows, counts, last_seen = self._within_bound(self._pool)
        if rows.size < num:
            everywhere = np.arange(self.num_items)
            rows, counts, last_seen = self._within_bound(everywhere, max(_POOL, num))
        self._pool = rows
        few = counts <= np.partition(counts, num - 1)[num - 1]
        rows = rows[few]
        return rows[np.lexsort((rows, last_seen[few], counts[few]))[:num]]

    def _within_bound(self, rows: np.ndarray, num: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give those of the rows whose (count, last step) is at most the bound, with both numbers.

        With ``num``, the bound becomes that of the num-th least useful of these rows.
        """
        keys = self.keys[rows]
        counts, last_seen = self.counts[keys], self.last_seen[keys]
        if num:
            num = min(num, rows.size)
            count = np.partition(counts, num - 1)[num - 1]
            steps = last_seen[counts == count]
            left = num - int((counts < count).sum()) - 1
            self._bound = (int(count), int(np.partition(steps, left)[left]))
        is_within = (counts < self._bound[0]) | ((counts == self._bound[0]) & (last_seen <= self._bound[1]))
        return rows[is_within], counts[is_within], last_seen[is_within]

    def to_table(self) -> pa.Table:
        """Copy what is known of every id that was seen: ``item_id``, ``row`` (-1: none), ``count`` and ``last_seen``."""
        seen = np.flatnonzero((self.counts > 0) | (self.rows != NO_ROW))
        columns = [self.item_ids.take(pa.array(seen)), *(part[seen] for part in (self.rows, self.counts, self.last_seen))]
        return pa.table(columns, names=list(_COLUMNS), metadata={"capacity": str(self.config.capacity)})

    def load(self, path: Path) -> None:
        """Replace everything by a table that `to_table` gave; ids that the dataset lacks are kept.

        Raises:
            InputError: the file cannot be read or is no such table, or has ids of another type or another capacity.
        """
        item_ids, rows, counts, last_seen = _read(path, self.config.capacity)
        keys = self.vocabulary.encode(item_ids)
        is_missing = keys < 0
        keys[is_missing] = self.vocabulary.num_items + np.arange(is_missing.sum())
        self._set_ids(pa.concat_arrays([self.vocabulary.item_ids, item_ids.filter(pa.array(is_missing))]))
        self.rows[keys], self.counts[keys], self.last_seen[keys] = rows, counts, last_seen
        has_row = rows != NO_ROW
        self.num_items = int(has_row.sum())
        self.keys[rows[has_row]] = keys[has_row]

    def begin_run(self) -> None:
        """Begin to count for a new run: what was seen before is past, and weighs less.

        Ids that wait to be admitted and are not in the dataset are forgotten, so that the map does not grow from run to run.
        """
        self.counts = (self.counts * self.config.decay).astype(np.int64)
        self.last_seen -= self.last_seen.max(initial=-1) + 1
        waits = self.rows[self.vocabulary.num_items :] == NO_ROW
        self.counts[self.vocabulary.num_items :][waits] = 0


def read_admitted(path: Path, capacity: int) -> Vocabulary:
    """Read the items that have rows from a table that `IdMap.to_table` gave: item i has row i, counts are the map's.

    Raises:
        InputError: the file cannot be read, is no such table or is of another capacity, or no item has a row.
    """
    item_ids, rows, counts, _ = _read(path, capacity)
    has_row = np.flatnonzero(rows != NO_ROW)
    if not has_row.size:
        raise InputError(f"{path} has no item with a row: none was seen vocabulary.admit_after times")
    order = has_row[np.argsort(rows[has_row])]
    return Vocabulary(item_ids.take(pa.array(order)), counts[order])


def _read(path: Path, capacity: int) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Read a table of an id map: ids, rows, counts and steps."""
    try:
        table = pq.read_table(path)
        item_ids, *numbers = (table[name].combine_chunks() for name in _COLUMNS)
        saved = int((table.schema.metadata or {})[b"capacity"])
        rows, counts, last_seen = (column.cast(pa.int64()).to_numpy() for column in numbers)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no id map of data.vocabulary=dynamic: {error}") from error
    if saved != capacity:
        raise InputError(f"vocabulary.capacity is {capacity}, but the item table of {path.parent} has {saved} rows: give that")
    used = np.sort(rows[rows != NO_ROW])
    if item_ids.null_count or used.size > capacity or not np.array_equal(used, np.arange(used.size)):
        raise InputError(f"{path} is damaged: its rows are not 0, 1, 2, ..., each once")
    return item_ids, rows, counts, last_seen
