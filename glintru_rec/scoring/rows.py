"""Rows to score: histories and candidates with original ids in, ragged vocabulary indices out.

Rows that cannot be scored come out too, each with its reason. No step is a loop over rows.

Shapes: R rows of a batch as read, B of them to be scored, T and C items of a ragged column, F side features.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary


class Reason(enum.StrEnum):
    """Why a row is set aside; where several apply, the first."""

    NULL_USER = "null_user"
    NULL_ITEM = "null_item"
    NULL_HISTORY = "null_history"
    NULL_HISTORY_ITEM = "null_history_item"
    OTHER_LENGTH = "side_feature_of_other_length"
    OTHER_TYPE = "value_of_other_type"
    NULL_DENIED = "null_denied"
    NULL_DENIED_ITEM = "null_denied_item"
    NULL_CANDIDATES = "null_candidates"
    NULL_CANDIDATE = "null_candidate"
    TOO_MANY_CANDIDATES = "too_many_candidates"
    EMPTY_HISTORY = "empty_history"


_REASONS = np.array(list(Reason), dtype=object)


class Columns(NamedTuple):
    """The names of the columns to read."""

    user: str
    history: str | None
    """None where the model reads none."""
    candidates: str | None
    """None where no candidates are asked for."""
    denied: str | None = None
    """None where no row has items to leave out."""
    side: tuple[str, ...] = ()
    """Lists of side features, as long as the histories."""
    kept: tuple[str, ...] = ()
    """To be written beside the scores, as they are."""

    @property
    def lists(self) -> list[str]:
        """The names of those that hold lists of items."""
        return [name for name in (self.history, self.candidates, self.denied) if name is not None]

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return list(dict.fromkeys([self.user, *self.lists, *self.side, *self.kept]))


class Limits(NamedTuple):
    """Which rows are scored, of those that are whole."""

    max_candidates: int
    """Rows with more are set aside."""
    keep_empty: bool
    """Histories without a known item are scored, too."""


class Ragged(NamedTuple):
    """Vocabulary indices, row after row."""

    indices: np.ndarray
    """int64 ``[T]``, all known."""
    lengths: np.ndarray
    """int64 ``[B]``."""


@dataclass(frozen=True)
class Rows:
    """One batch, ready to be scored.

    Attributes:
        num_read: rows read, R: those to be scored and those set aside.
        users: their ids as they were, ``[B]``.
        history: the known items of each, oldest first; none is empty unless such rows were to be kept.
        candidates: the known candidates of each, in the order given; empty where none are asked for.
        denied: the known items that must not be found for each.
        side_ids: side features of the events in ``history``, int64 ``[T, F]``; ``[0, 0]`` where the model reads none.
        unknown_history_items: items of histories that were skipped because the vocabulary lacks them. Those of a row
            that has no item left count too.
        unknown_candidates: candidates left out because the vocabulary lacks them: user_id, item_id, fragment, row.
        set_aside: the other rows: user_id, reason, fragment, row.
        kept: the columns to keep, ``[B]``.
    """

    num_read: int
    users: pa.Array
    history: Ragged
    candidates: Ragged
    denied: Ragged
    side_ids: np.ndarray
    unknown_history_items: int
    unknown_candidates: pa.Table
    set_aside: pa.Table
    kept: list[pa.Array]

    @property
    def num_fallback(self) -> int:
        """How many rows have no history and can be scored by popularity alone."""
        return int((self.history.lengths == 0).sum())


def decode(
    batch: pa.RecordBatch,
    columns: Columns,
    vocabulary: Vocabulary,
    fragment: str,
    first_row: int,
    limits: Limits,
    side: SideVocabulary = NO_SIDE,
) -> Rows:
    """Look up the items of a batch and set aside the rows that cannot be scored.

    Args:
        batch: has the ``columns``, of types that `open_fragments` allows.
        columns: which is which.
        vocabulary: gives the indices.
        fragment: where the rows are from, for what is set aside.
        first_row: number of the batch's first row in the fragment.
        limits: which whole rows are to be scored.
        side: gives the indices of the values of ``columns.side``. A row without a list has unknown values.
    """
    users = plain(batch.column(columns.user))
    no_lists = pa.repeat(pa.scalar([], pa.list_(pa.null())), len(batch))
    history, candidates, denied = (
        _Lists(batch.column(name) if name else no_lists, vocabulary)
        for name in (columns.history, columns.candidates, columns.denied)
    )

    reason = np.full(len(batch), -1)
    mark(reason, Reason.NULL_USER, is_null(users))
    mark(reason, Reason.NULL_HISTORY, history.is_null)
    mark(reason, Reason.NULL_HISTORY_ITEM, history.holds_null)
    for name in columns.side:
        lengths = pc.list_value_length(batch.column(name)).fill_null(-1).to_numpy(zero_copy_only=False)
        mark(reason, Reason.OTHER_LENGTH, (lengths >= 0) & (lengths != history.lengths))
    mark(reason, Reason.NULL_DENIED, denied.is_null)
    mark(reason, Reason.NULL_DENIED_ITEM, denied.holds_null)
    mark(reason, Reason.NULL_CANDIDATES, candidates.is_null)
    mark(reason, Reason.NULL_CANDIDATE, candidates.holds_null)
    mark(reason, Reason.TOO_MANY_CANDIDATES, candidates.lengths > limits.max_candidates)
    unknown_items = history.unknown(reason < 0)
    if not limits.keep_empty:
        mark(reason, Reason.EMPTY_HISTORY, history.num_known == 0)
    keep = reason < 0
    unknown_candidates = candidates.unknown(keep)
    return Rows(
        num_read=len(batch),
        users=users.filter(pa.array(keep)),
        history=history.known(keep),
        candidates=candidates.known(keep),
        denied=denied.known(keep),
        side_ids=_side_ids(batch, columns.side, side, history, keep),
        unknown_history_items=len(unknown_items),
        unknown_candidates=located(
            users,
            candidates.rows[unknown_candidates],
            "item_id",
            candidates.values.take(pa.array(unknown_candidates)),
            fragment,
            first_row,
        ),
        set_aside=set_aside(users, reason, fragment, first_row),
        kept=[plain(batch.column(name)).filter(pa.array(keep)) for name in columns.kept],
    )


def set_aside(users: pa.Array, reason: np.ndarray, fragment: str, first_row: int) -> pa.Table:
    """List the rows that have a reason (place in `Reason`; -1: none): user_id, reason, fragment, row."""
    aside = np.flatnonzero(reason >= 0)
    return located(users, aside, "reason", pa.array(_REASONS[reason[aside]], pa.string()), fragment, first_row)


def located(users: pa.Array, rows: np.ndarray, name: str, column: pa.Array, fragment: str, first_row: int) -> pa.Table:
    """Say of whom, and where in the input, values of some rows of a batch are."""
    user = users.take(pa.array(rows)).cast(pa.string())
    where = {"fragment": pa.repeat(pa.scalar(fragment), len(rows)), "row": pa.array(rows + first_row)}
    return pa.table({"user_id": user, name: column.cast(pa.string()), **where})


def _side_ids(
    batch: pa.RecordBatch, names: Sequence[str], side: SideVocabulary, history: "_Lists", keep: np.ndarray
) -> np.ndarray:
    """Look up the side features of the known items of the rows to keep, whose lists are as long as the history or null."""
    if not names:
        return np.empty((0, 0), np.int64)
    is_event = (history.indices >= 0) & keep[history.rows]
    side_ids = np.zeros((is_event.sum(), len(names)), np.int64)
    for place, name in enumerate(names):
        column = batch.column(name)
        has_list = keep & ~is_null(column)
        values = column.filter(pa.array(has_list)).flatten()
        side_ids[has_list[history.rows[is_event]], place] = side.encode(name, values)[is_event[has_list[history.rows]]]
    return side_ids


def plain(array: pa.Array) -> pa.Array:
    """Write out what is encoded as a dictionary, and as strings what is views of them, for which pyarrow lacks functions."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string()) if str(array.type) == "string_view" else array


class _Lists:
    """A list column as read, ids looked up.

    Most columns know all their ids and hold no null; what is not so is found in one pass, and costs more only where it is.

    Attributes:
        values: all ids, ``[T]``.
        lengths: ids of each row, 0 where there is no list, int64 ``[R]``.
        indices: the index of each, -1 where unknown, ``[T]``.
        is_known: whether each has an index, ``[T]``; None where all have one.
        is_null: whether a row has no list, ``[R]``.
        holds_null: whether a row's list has a null inside, ``[R]``.
        num_known: known ids of each row, int64 ``[R]``.
    """

    def __init__(self, column: pa.Array, vocabulary: Vocabulary):
        lengths = pc.list_value_length(column).fill_null(0)
        self.lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
        self.values = plain(column.flatten())
        self.indices = vocabulary.encode(self.values)
        self.is_null = is_null(column)
        self.holds_null = np.zeros(len(column), dtype=bool)
        if self.values.null_count:
            self.holds_null[self.rows[is_null(self.values)]] = True
        is_known = self.indices >= 0
        self.is_known = None if is_known.all() else is_known
        self.num_known = self.lengths
        if self.is_known is not None:
            self.num_known = np.bincount(self.rows[is_known], minlength=len(column))

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each id, ``[T]``."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def known(self, keep: np.ndarray) -> Ragged:
        """Give the known ids of the rows to keep."""
        if self.is_known is None:
            return Ragged(self.indices if keep.all() else self.indices[keep[self.rows]], self.lengths[keep])
        return Ragged(self.indices[self.is_known & keep[self.rows]], self.num_known[keep])

    def unknown(self, keep: np.ndarray) -> np.ndarray:
        """Give the places in ``values`` of the unknown ids of the rows to keep."""
        if self.is_known is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(~self.is_known & keep[self.rows])


def is_null(array: pa.Array) -> np.ndarray:
    """Say which values are null: bool ``[N]``."""
    return array.is_null().to_numpy(zero_copy_only=False)


def mark(reason: np.ndarray, why: Reason, rows: np.ndarray) -> None:
    """Note a reason for the rows that have none yet."""
    reason[rows & (reason < 0)] = list(Reason).index(why)
