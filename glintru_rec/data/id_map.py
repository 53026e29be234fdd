"""A dynamic vocabulary: which item has which row of the item table, while items come and go.

An id that is seen is counted. One seen ``admit_after`` times is due, and is admitted if a row is free, or if it has been seen
more than ``evict_ratio`` times as often as the least useful item admitted, which then gives its row up: the one seen the
fewest times, of these the one not seen for longest, of these that with the smallest row::

    seen --> candidate --count >= admit_after--> due --a row is free-------------------------------> admitted
             |       ^                           +----count > evict_ratio · least useful's count--> admitted, to that one's row
             forgotten                                                        which is a candidate again <--+

Memory is bounded, whatever is seen: by ``capacity`` rows and ``candidates``. Where more ids wait than these, those not seen for
longest are forgotten. So no count is ever too high, and one is too low only by what was seen before a time in which at least
half as many other ids as there may be candidates came up without being admitted.

Everything follows from what was seen in which step, so that ranks which see the same keep equal maps. An id is known by its
*key*: an int64 id is its own, a string's is a hash of 64 bits. Two of n strings share one with a chance of about n² / 2⁶⁵ (10⁸
strings: 1 in 3,700); as candidates they are counted as one, but the strings of admitted items are held and compared, so that
none is taken for another: it is found to *collide*, and has no row while the other has one.

Shapes: N ids or keys; E entries, ``capacity`` rows and behind them ``candidates``.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.config import check
from glintru_rec.data.lookup import HashTable, hash_texts
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

ID_MAP_FILE = "id_map.parquet"
NO_ROW = -1
_COLUMNS = ("key", "item_id", "row", "count", "last_seen")
# Least useful items that one pass over all rows finds; the next steps look among these alone.
_POOL = 1 << 16
# Candidates of a config that does not say how many: many times the new ids of a step. With fewer than a step brings, each would
# be forgotten before it is seen again, and nothing ever admitted.
_MIN_CANDIDATES = 1 << 20
# Slots of the hash table for each entry: 8 to 16 bytes.
_SLOTS_PER_ENTRY = 2
_TEXT = np.dtypes.StringDType()


@dataclass
class VocabularyConfig:
    """Which items have rows, with ``data.vocabulary=dynamic``.

    Attributes:
        capacity: rows of the item table, the most items that are known at a time; the same in a run that starts from another
            (``trainer.init_from``).
        candidates: ids without a row whose counts are kept, at most; 0: as many as ``capacity``, and at least 2²⁰. When they
            are full, the half that has not been seen for longest is forgotten: take many times what all ranks' batches of a
            step have of ids that are new, or nothing is ever admitted.
        admit_after: an item is admitted once it has been seen this often. The first epoch of a run counts what its batches hold
            (the item where a history longer than ``data.max_seq_len`` is cut, twice); later epochs repeat its events and count
            none, so that the vocabulary then stands still.
        evict_ratio: once all rows are taken, a new item takes the row of the least useful one if it has been seen more than
            this many times as often. At 1, items of nearly equal counts take each other's rows, and begin anew each time.
        decay: what all counts are multiplied by, and rounded down, where a run starts from another: 1 forgets nothing, with
            0.5 what was seen a run earlier counts half.
    """

    capacity: int = 0
    candidates: int = 0
    admit_after: int = 5
    evict_ratio: float = 2.0
    decay: float = 0.5

    def __post_init__(self):
        check("vocabulary.capacity", self.capacity, self.capacity >= 0, "at least 1, or 0 with data.vocabulary=dense")
        check("vocabulary.candidates", self.candidates, self.candidates >= 0, "at least 1, or 0 for as many as are enough")
        check("vocabulary.admit_after", self.admit_after, self.admit_after >= 1, "at least 1")
        finite = 1 <= self.evict_ratio < math.inf
        check("vocabulary.evict_ratio", self.evict_ratio, finite, "at least 1 and finite")
        check("vocabulary.decay", self.decay, 0 <= self.decay <= 1, "from 0 to 1")

    @property
    def num_candidates(self) -> int:
        """The most ids without a row whose counts are kept."""
        return self.candidates or max(self.capacity, _MIN_CANDIDATES)


class Changes(NamedTuple):
    """What a step changed."""

    rows: np.ndarray
    """Rows that went to items admitted now, each once, int64 ``[A]``."""
    num_evicted: int
    """How many of them other items had to give up."""


class Found(NamedTuple):
    """What a map knows of ids."""

    rows: np.ndarray
    """Row of each, `NO_ROW` for one that is not admitted, int64 ``[N]``."""
    collides: np.ndarray
    """Whether it is another id than the admitted one of its key, and so cannot be told apart, bool ``[N]``."""


class IdMap:
    """Count ids, and give the most frequent of them rows.

    An item keeps its row as long as it is admitted. Rows ``0 .. num_items - 1`` are in use, those behind never were. An item
    that lost its row is a candidate with its count, and is due again when it is seen again.

    Args:
        id_type: ``int64`` or ``string``.
        config: how many are admitted, and when.

    Attributes:
        keys: of each entry in use: the items in their rows, then candidates in no order, int64 ``[E]``.
        counts: how often each has been seen, int64 ``[E]``.
        last_seen: the step when each was seen last; negative: in an earlier run. int64 ``[E]``.
        names: the strings of the admitted items, by row, ``[capacity]``; of int64 ids none, ``[0]``.
        num_items: items admitted.
    """

    def __init__(self, id_type: str, config: VocabularyConfig):
        self.id_type, self.config = id_type, config
        size = config.capacity + config.num_candidates
        self.keys, self.counts, self.last_seen = np.zeros((3, size), np.int64)
        self.names = np.zeros(config.capacity if id_type == "string" else 0, _TEXT)
        self._begin(0, 0)

    def _begin(self, num_items: int, num_candidates: int) -> None:
        """Take the first rows, and the first entries behind all rows, for what is known."""
        self.num_items, first = num_items, self.config.capacity
        self._free = np.arange(first, self.keys.size)[::-1].copy()  # a stack: the last of the free ones is given out next
        self._num_free = self._free.size - num_candidates
        known = np.concatenate([np.arange(num_items), np.arange(first, first + num_candidates)])
        self._table = HashTable(self.keys.view(np.uint64), known, _SLOTS_PER_ENTRY)
        # Holds the rows of all items whose (count, last step) is at most the bound. That stays true by itself: both only grow,
        # and rows change hands to more frequent items.
        self._pool, self._bound = np.zeros(0, np.int64), (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the map, the letters of strings of more than 15 bytes left out."""
        arrays = (self.keys, self.counts, self.last_seen, self.names, self._free, self._pool, self._table)
        return sum(each.nbytes for each in arrays)

    def keys_of(self, ids: pa.Array) -> np.ndarray:
        """Give the key of every id, none of them null: int64 ``[N]``.

        Raises:
            InputError: they are of another type than the map's.
        """
        if str(ids.type) != self.id_type:
            raise InputError(f"the item ids are {ids.type}, those of the run's id map are {self.id_type}; write them as these")
        if self.id_type == "int64":
            return ids.to_numpy()
        return hash_texts(ids, int(pc.max(pc.binary_length(ids)).as_py() or 0)).view(np.int64)

    def find(self, ids: pa.Array, keys: np.ndarray | None = None) -> Found:
        """Look ids up, which may come more than once; none is counted by it.

        Args:
            ids: int64 or string as the map's, ``[N]``.
            keys: theirs, where they are known already.
        """
        rows = self._table.find((self.keys_of(ids) if keys is None else keys).view(np.uint64))
        rows[rows >= self.config.capacity] = NO_ROW
        collides = np.zeros(rows.size, bool)
        if self.id_type == "string":
            places = np.flatnonzero(rows != NO_ROW)
            collides[places] = self.names[rows[places]] != _texts(ids.take(pa.array(places)))
            rows[collides] = NO_ROW
        return Found(rows, collides)

    def update(self, keys: np.ndarray, counts: np.ndarray, step: int) -> Changes:
        """Count what a step has seen, admit what is due.

        Of those that are due, the one seen most often comes first, of equal ones that of the smallest key. While rows are free,
        it gets the next one. The caller gives the strings of rows that changed hands to `name`.

        Args:
            keys: distinct, ascending, int64 ``[N]``.
            counts: how often the step holds each, at least 1, int64 ``[N]``.
            step: greater than at the last call.
        """
        entries = self._table.find(keys.view(np.uint64))
        is_known = entries >= 0
        self.counts[entries[is_known]] += counts[is_known]
        self.last_seen[entries[is_known]] = step
        self._take_in(keys[~is_known], counts[~is_known], step)

        entries = self._table.find(keys.view(np.uint64))
        due = entries[entries >= self.config.capacity]
        due = due[self.counts[due] >= self.config.admit_after]
        due = due[np.argsort(-self.counts[due], kind="stable")]
        free = np.arange(self.num_items, min(self.num_items + due.size, self.config.capacity))
        self._give_free_rows(due[: free.size], free)
        waiting = due[free.size :]
        taken = self._least_useful(min(waiting.size, self.num_items)) if waiting.size else free[:0]
        # The first that is due is held against the least useful item, the second against the next: once one loses, so do all.
        waiting = waiting[: taken.size]
        is_better = self.counts[waiting] > self.config.evict_ratio * self.counts[taken]
        waiting, taken = waiting[is_better], taken[is_better]
        self._change_places(waiting, taken)
        return Changes(np.concatenate([free, taken]), taken.size)

    def name(self, rows: np.ndarray, ids: pa.Array) -> None:
        """Note the strings of rows that changed hands, ``[A]``; int64 ids need none."""
        self.names[rows] = _texts(ids)

    def _take_in(self, keys: np.ndarray, counts: np.ndarray, step: int) -> None:
        """Make ids that are not known candidates, and room for them where there is too little."""
        size = self.config.num_candidates
        if keys.size > size:
            most = np.sort(np.lexsort((keys, -counts))[:size])
            keys, counts = keys[most], counts[most]
        if keys.size > self._num_free:
            self._forget(min(size // 2, size - keys.size))
        entries = self._free[self._num_free - keys.size : self._num_free]
        self._num_free -= keys.size
        self.keys[entries], self.counts[entries], self.last_seen[entries] = keys, counts, step
        self._table.add(entries)

    def _forget(self, num_kept: int) -> None:
        """Keep so many candidates: those seen last, of equal ones those seen most often, then those of the smallest keys."""
        known = self._candidates()
        order = np.lexsort((self.keys[known], -self.counts[known], -self.last_seen[known]))
        self._release(known[order[num_kept:]])

    def _release(self, entries: np.ndarray) -> None:
        self._table.remove(entries)
        self._free[self._num_free : self._num_free + entries.size] = entries
        self._num_free += entries.size

    def _candidates(self) -> np.ndarray:
        """Give the entries of all candidates, ascending."""
        in_use = np.ones(self.config.num_candidates, bool)
        in_use[self._free[: self._num_free] - self.config.capacity] = False
        return self.config.capacity + np.flatnonzero(in_use)

    def _give_free_rows(self, entries: np.ndarray, rows: np.ndarray) -> None:
        self._release(entries)
        for values in (self.keys, self.counts, self.last_seen):
            values[rows] = values[entries]
        self._table.add(rows)
        self.num_items += rows.size

    def _change_places(self, entries: np.ndarray, rows: np.ndarray) -> None:
        self._table.remove(np.concatenate([entries, rows]))
        for values in (self.keys, self.counts, self.last_seen):
            values[entries], values[rows] = values[rows], values[entries]
        self._table.add(np.concatenate([entries, rows]))

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
        counts, last_seen = self.counts[rows], self.last_seen[rows]
        if num:
            num = min(num, rows.size)
            count = np.partition(counts, num - 1)[num - 1]
            steps = last_seen[counts == count]
            left = num - int((counts < count).sum()) - 1
            self._bound = (int(count), int(np.partition(steps, left)[left]))
        is_within = (counts < self._bound[0]) | ((counts == self._bound[0]) & (last_seen <= self._bound[1]))
        return rows[is_within], counts[is_within], last_seen[is_within]

    def to_table(self) -> pa.Table:
        """Copy the map: admitted items in their rows, then candidates by key.

        Columns: ``key``, ``item_id`` (null for a candidate), ``row`` (-1: none), ``count`` and ``last_seen``.
        """
        candidates = self._candidates()
        candidates = candidates[np.argsort(self.keys[candidates])]
        rows = np.arange(self.num_items)
        entries = np.concatenate([rows, candidates])
        names = self.keys[rows] if self.id_type == "int64" else self.names[rows].tolist()
        item_ids = pa.concat_arrays([pa.array(names, self.id_type), pa.nulls(candidates.size, self.id_type)])
        given = np.concatenate([rows, np.full(candidates.size, NO_ROW)])
        columns = [self.keys[entries], item_ids, given, self.counts[entries], self.last_seen[entries]]
        return pa.table(columns, names=list(_COLUMNS), metadata={"capacity": str(self.config.capacity)})

    def load(self, path: Path) -> None:
        """Replace everything by a table that `to_table` gave; of too many candidates, keep those seen last.

        Raises:
            InputError: the file cannot be read or is no such table, or has ids of another type or another capacity.
        """
        saved = _read(path, self.config.capacity)
        if str(saved.item_ids.type) != self.id_type:
            raise InputError(f"{path} has {saved.item_ids.type} ids, the dataset's are {self.id_type}: prepare it with those")
        if not np.array_equal(self.keys_of(saved.item_ids), saved.numbers[0, : len(saved.item_ids)]):
            raise InputError(f"{path} is damaged: its keys are not those of its ids")
        admitted, waiting = np.split(saved.numbers, [len(saved.item_ids)], axis=1)
        order = np.lexsort((waiting[0], -waiting[1], -waiting[2]))[: self.config.num_candidates]
        num_items, first = admitted.shape[1], self.config.capacity
        for values, of_items, of_others in zip((self.keys, self.counts, self.last_seen), admitted, waiting, strict=True):
            values[:num_items], values[first : first + order.size] = of_items, of_others[order]
        if self.id_type == "string":
            self.name(np.arange(num_items), saved.item_ids)
        self._begin(num_items, order.size)

    def begin_run(self) -> None:
        """Begin to count for a new run: what was seen before is past and weighs less; candidates of no weight are forgotten."""
        candidates = self._candidates()
        known = np.concatenate([np.arange(self.num_items), candidates])
        self.counts[known] = (self.counts[known] * self.config.decay).astype(np.int64)
        self.last_seen[known] -= self.last_seen[known].max(initial=-1) + 1
        self._release(candidates[self.counts[candidates] == 0])


def read_admitted(path: Path, capacity: int) -> Vocabulary:
    """Read the items that have rows from a table that `IdMap.to_table` gave: item i has row i, counts are the map's.

    Raises:
        InputError: the file cannot be read, is no such table or is of another capacity, or no item has a row.
    """
    saved = _read(path, capacity)
    if not len(saved.item_ids):
        raise InputError(f"{path} has no item with a row: none was seen vocabulary.admit_after times")
    return Vocabulary(saved.item_ids, saved.numbers[1, : len(saved.item_ids)])


class _Saved(NamedTuple):
    """A table of an id map."""

    item_ids: pa.Array
    """Of the items admitted, by row."""
    numbers: np.ndarray
    """Key, count and last step of these, then of the candidates, int64 ``[3, E]``."""


def _read(path: Path, capacity: int) -> _Saved:
    try:
        table = pq.read_table(path).select(_COLUMNS)
        saved = int((table.schema.metadata or {})[b"capacity"])
        item_ids = table["item_id"].combine_chunks()
        keys, rows, counts, last_seen = (table[name].cast(pa.int64()).to_numpy() for name in _COLUMNS if name != "item_id")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no id map of data.vocabulary=dynamic: {error}") from error
    if saved != capacity:
        raise InputError(f"vocabulary.capacity is {capacity}, but the item table of {path.parent} has {saved} rows: give that")
    num_items = int((rows != NO_ROW).sum())
    is_in_order = np.array_equal(rows[:num_items], np.arange(num_items)) and num_items <= capacity
    if not is_in_order or item_ids[:num_items].null_count or np.unique(keys).size != keys.size:
        raise InputError(f"{path} is damaged: its rows are not 0, 1, 2, ..., or a key comes twice")
    return _Saved(item_ids[:num_items], np.stack([keys, counts, last_seen]))


def _texts(ids: pa.Array) -> np.ndarray:
    return np.array(ids.to_pylist(), _TEXT)
