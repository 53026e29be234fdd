"""Mode rank: examples with the values of their features in, the predictions of a ranking model out.

A row of the input is an example, with the columns

=================  ==================================================================================================
``user_id``        whose it is; it comes out again, and the model does not read it
``item_id``        the candidate
``history``        the user's events before the example: a list of item ids, oldest first; may be empty
``sequence.NAME``  a list of another value of each of these events; null: unknown values
``sparse.NAME``    a value, or a list of them; null: unknown, or an empty list
``dense.NAME``     a number; null: unknown
=================  ==================================================================================================

Each feature holds what its expression gave when the dataset was prepared (the artifact's manifest has the expressions): the
job looks values up and scales numbers as preparing did, but cannot look back in a log, as the expressions' windows do. A
value that training did not see is the unknown one of its feature; an item likewise: it is scored, counted and listed. A row
with a value that the type of those that were learnt cannot hold (2^63 where they were int64) is set aside.

Shapes: R rows of a batch as read, B of them to be scored, T events, N pooled ids, F dense, G pooled and S sequence features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from glintru_rec.data.side_features import rows_of
from glintru_rec.errors import InputError
from glintru_rec.export.ranking_artifact import ITEM_FEATURE, RankingArtifact
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.fragments import Fragment, InputFile, is_list, open_all, open_file
from glintru_rec.scoring.rows import Columns, Reason, is_null, located, mark, plain, set_aside


@dataclass(frozen=True)
class Examples:
    """One batch, ready to be scored.

    Attributes:
        num_read: rows read, R.
        users: their ids as they were, ``[B]``.
        items: the candidates as they were, ``[B]``.
        inputs: what ``predict`` of the artifact takes.
        unknown_history_items: items of histories that training did not see.
        unknown_candidates: candidates that training did not see: user_id, item_id, fragment, row.
        set_aside: the rows that cannot be scored: user_id, reason, fragment, row.
        num_fallback: 0: the model itself knows what to make of an empty history.
    """

    num_read: int
    users: pa.Array
    items: pa.Array
    inputs: tuple[Tensor, ...]
    unknown_history_items: int
    unknown_candidates: pa.Table
    set_aside: pa.Table
    num_fallback: int = 0


class ExampleScorer:
    """What a job of mode rank does to every file and batch.

    Args:
        config: of the job.
        artifact: of a ranking model.
    """

    unknown_listed_items = 0

    def __init__(self, config: ScoreConfig, artifact: RankingArtifact):
        self._config, self._artifact = config, artifact
        self._sparse = {name: f"sparse.{name}" for name in artifact.features("sparse")}
        self._sequence = {name: f"sequence.{name}" for name in artifact.features("sequence")}
        self._dense = [f"dense.{name}" for name in artifact.manifest["dense"]]
        self._history = config.history_column if artifact.manifest["has_tower"] else None
        side = (config.item_column, *self._sequence.values(), *self._sparse.values(), *self._dense)
        self._looked_up = {config.item_column: ITEM_FEATURE}
        self._looked_up |= {self._history: ITEM_FEATURE} if self._history else {}
        self._looked_up |= {column: f"sequence:{name}" for name, column in self._sequence.items()}
        self._looked_up |= {column: f"sparse:{name}" for name, column in self._sparse.items()}
        self._columns = Columns(config.user_column, self._history, None, None, side)

    def open(self, files: list[InputFile]) -> dict[str, Fragment | InputError]:
        """Open all files of the input (see `open_all`)."""
        return open_all(files, self._open)

    def _open(self, file: InputFile) -> Fragment:
        hint = "Name the right ones with user_column, history_column and item_column"
        fragment, schema = open_file(file, self._columns, hint, f"{hint}; the others are the model's features")
        for column, feature in self._looked_up.items():
            kind, values = schema.field(column).type, self._artifact.values[feature].type
            in_lists = is_list(kind) if column in self._sparse.values() else column != self._config.item_column
            if is_list(kind) != in_lists or not _fits(kind.value_type if in_lists else kind, values):
                raise InputError(
                    f"column {column!r} of {str(file.path)!r} has type {kind}; the model learnt values of "
                    f"type {values}, so write it as {f'list<{values}>' if in_lists else values}"
                )
        for column in self._dense:
            kind = schema.field(column).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
                raise InputError(f"column {column!r} of {str(file.path)!r} has type {kind}; it must hold numbers")
        return fragment

    def read(self, fragment: Fragment) -> Iterator[Examples]:
        """Read a fragment, a batch at a time.

        Raises:
            InputError: it is damaged.
        """
        first_row = 1
        for batch in fragment.batches(self._config.batch_size):
            try:
                yield self._decode(batch, fragment.file.name, first_row, np.zeros(len(batch), bool))
            except pa.ArrowInvalid:
                yield self._decode(batch, fragment.file.name, first_row, self._of_other_type(batch))
            first_row += len(batch)

    def _of_other_type(self, batch: pa.RecordBatch) -> np.ndarray:
        """Say which rows hold a value that the type of those that were learnt cannot: bool ``[R]``."""
        found = np.zeros(len(batch), bool)
        for column, feature in self._looked_up.items():
            values = batch.column(column)
            rows = np.arange(len(batch))
            if is_list(values.type):
                rows, values = np.repeat(rows, _lengths(values)), values.flatten()
            found[rows[_cannot_be(plain(values), self._artifact.values[feature].type)]] = True
        return found

    def _decode(self, batch: pa.RecordBatch, fragment: str, first_row: int, of_other_type: np.ndarray) -> Examples:
        """Look up the values of a batch and set aside the rows that cannot be scored."""
        users, items = plain(batch.column(self._columns.user)), plain(batch.column(self._config.item_column))
        reason = np.full(len(batch), -1)
        mark(reason, Reason.NULL_USER, is_null(users))
        mark(reason, Reason.NULL_ITEM, is_null(items))
        if self._history:
            history = batch.column(self._history)
            mark(reason, Reason.NULL_HISTORY, is_null(history))
            mark(reason, Reason.NULL_HISTORY_ITEM, _holds_null(history))
            for column in self._sequence.values():
                lengths = _lengths(batch.column(column))
                mark(reason, Reason.OTHER_LENGTH, ~is_null(batch.column(column)) & (lengths != _lengths(history)))
        mark(reason, Reason.OTHER_TYPE, of_other_type)
        keep = pa.array(reason < 0)
        kept = batch.filter(keep)
        candidates = self._rows(ITEM_FEATURE, kept.column(self._config.item_column))
        events, lengths = self._events(kept)
        unknown = np.flatnonzero(candidates == 0)
        where = np.flatnonzero(reason < 0)[unknown]
        known_users, known_items = users.filter(keep), items.filter(keep)
        inputs = (self._numbers(kept), *self._pooled(kept), events, lengths, candidates)
        return Examples(
            num_read=len(batch),
            users=known_users,
            items=known_items,
            inputs=tuple(torch.from_numpy(array) for array in inputs),
            unknown_history_items=int((events[:, 0] == 0).sum()),
            unknown_candidates=located(users, where, "item_id", known_items.take(pa.array(unknown)), fragment, first_row),
            set_aside=set_aside(users, reason, fragment, first_row),
        )

    def _numbers(self, kept: pa.RecordBatch) -> np.ndarray:
        """Give the dense features, NaN for null: float64 ``[B, F]``."""
        # Unsafe, as preparing does it: whole numbers above 2^53 are rounded.
        columns = [kept.column(column).cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy() for column in self._dense]
        return np.stack(columns, axis=1) if columns else np.zeros((len(kept), 0))

    def _pooled(self, kept: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Give the rows of the pooled features' values, int64 ``[N]``, and their numbers, int64 ``[G, B]``."""
        rows, lengths = [np.zeros(0, np.int64)], []
        for name, column in self._sparse.items():
            values = kept.column(column)
            lengths.append(_lengths(values) if is_list(values.type) else np.ones(len(kept), np.int64))
            rows.append(self._rows(f"sparse:{name}", values.flatten() if is_list(values.type) else values))
        return np.concatenate(rows), np.stack(lengths) if lengths else np.zeros((0, len(kept)), np.int64)

    def _events(self, kept: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Give the events of the histories, int64 ``[T, 1 + S]``, and their numbers, int64 ``[B]``."""
        if not self._history:
            return np.zeros((0, 1), np.int64), np.zeros(len(kept), np.int64)
        history = kept.column(self._history)
        lengths = _lengths(history)
        events = np.zeros((lengths.sum(), 1 + len(self._sequence)), np.int64)
        events[:, 0] = self._rows(ITEM_FEATURE, history.flatten())
        for place, (name, column) in enumerate(self._sequence.items(), start=1):
            values = kept.column(column)
            is_told = np.repeat(~is_null(values), lengths)
            events[is_told, place] = self._rows(f"sequence:{name}", values.flatten())
        return events, lengths

    def _rows(self, feature: str, column: pa.Array) -> np.ndarray:
        values = self._artifact.values[feature]
        return rows_of(plain(column).cast(values.type), values)

    def schema(self, user_type: pa.DataType) -> pa.Schema:
        """Give the columns of a fragment's output: user_id, item_id, and each task's probability or number."""
        tasks = [(name, pa.float32()) for name in self._artifact.manifest["tasks"]]
        return pa.schema([("user_id", user_type), ("item_id", self._artifact.values[ITEM_FEATURE].type), *tasks])

    @torch.inference_mode()
    def score(self, rows: Examples) -> pa.Table:
        """Score one batch."""
        inputs = (tensor.to(self._config.device) for tensor in rows.inputs)
        predicted = self._artifact.module.predict(*inputs).cpu().numpy()
        schema = self.schema(rows.users.type)
        columns = [rows.users, rows.items.cast(schema.field("item_id").type), *map(pa.array, predicted.T)]
        return pa.table(columns, schema=schema)


def _fits(kind: pa.DataType, learnt: pa.DataType) -> bool:
    """Say whether values of a type can be looked up among those that were learnt."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind) or kind == learnt:
        return True
    if pa.types.is_integer(learnt) or pa.types.is_decimal(learnt):
        return pa.types.is_integer(kind)
    if pa.types.is_floating(learnt):
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)
    texts = ("string", "large_string", "string_view")
    return str(kind) in texts and str(learnt) in texts


def _cannot_be(values: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Say which values a type cannot hold, by halves, as few do not: bool ``[N]``."""
    try:
        values.cast(kind)
    except pa.ArrowInvalid:
        half = len(values) // 2
        return np.concatenate([_cannot_be(part, kind) for part in (values[:half], values[half:])]) if half else np.ones(1, bool)
    return np.zeros(len(values), bool)


def _lengths(column: pa.Array) -> np.ndarray:
    """Give the length of each list, 0 where there is none: int64 ``[N]``."""
    return pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _holds_null(column: pa.Array) -> np.ndarray:
    """Say which lists have a null inside."""
    found = np.zeros(len(column), bool)
    found[np.repeat(np.arange(len(column)), _lengths(column))[is_null(column.flatten())]] = True
    return found
