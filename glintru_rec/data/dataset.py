"""A prepared dataset: open it, check it, and split it leave-one-out.

::

    manifest.json                    counts, filters, what was set aside, vocabulary fingerprint, the list of parts
    vocabulary/items.parquet         item_id, index, count
    sequences/part-00000.parquet     user_id, items: list<int64>, timestamps: list<int64>; users as they first appear in the log
    set_aside.parquet                every row of the log that could not be used, with its reason

Leave-one-out, for a user with events ``a b c d e``: train ``a b c``, validation target ``d``, test target ``e``. A user with
fewer than three events is for training only.

Shapes: E events, U users, V items of the catalog, C evaluation cases.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.files import aside_of, publish

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary/items.parquet"
SET_ASIDE_FILE = "set_aside.parquet"
MIN_EVENTS_TO_SPLIT = 3
_HISTORIES_PER_WRITE = 1 << 16


@dataclass(frozen=True, eq=False)
class EvalCases:
    """The cases of one split: each asks for the item that follows a history.

    Attributes:
        history_items: the histories, one after the other, in time order, int64 ``[T]``.
        history_offsets: where each starts, int64 ``[C + 1]``, from 0 to T. No history is empty.
        targets: the items that followed, int64 ``[C]``.
        user_index: the place of each case's user in the dataset, int64 ``[C]``, ascending.
    """

    history_items: np.ndarray
    history_offsets: np.ndarray
    targets: np.ndarray
    user_index: np.ndarray


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """All sequences of a prepared dataset, in memory.

    Attributes:
        manifest: what ``manifest.json`` holds.
        vocabulary: original item id ↔ index; its fingerprint is the manifest's.
        user_ids: original user ids ``[U]``, int64 or string.
        items: vocabulary indices of all users, one after the other, in time order, int64 ``[E]``, all in ``[0, V)``.
        offsets: where each user starts in ``items``, int64 ``[U + 1]``, from 0 to E.
    """

    manifest: dict[str, Any]
    vocabulary: Vocabulary
    user_ids: pa.Array
    items: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, path: str | Path) -> "SequenceDataset":
        """Read a dataset and check that it is whole.

        Raises:
            InputError: a file is missing or corrupt, or the files do not belong together.
        """
        path = Path(path)
        manifest = read_manifest(path)
        vocabulary = read_vocabulary(path, manifest)
        parts = [_read_part(path / part["file"], part, vocabulary.num_items) for part in manifest["parts"]]
        return cls.join(manifest, vocabulary, parts)

    @classmethod
    def join(cls, manifest: dict[str, Any], vocabulary: Vocabulary, parts: "list[Sequences]") -> "SequenceDataset":
        """Make a dataset of some sequences, one part after the other."""
        user_ids, lengths, items = zip(*parts)
        return cls(manifest, vocabulary, pa.concat_arrays(user_ids), np.concatenate(items), _offsets(np.concatenate(lengths)))

    @property
    def num_items(self) -> int:
        """Number of items in the catalog, V."""
        return self.vocabulary.num_items

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return len(self.offsets) - 1

    @property
    def num_cases(self) -> int:
        """Number of users that evaluation asks for, C."""
        return int((np.diff(self.offsets) >= MIN_EVENTS_TO_SPLIT).sum())

    def train_sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the training events of every user: all but the last two, or all where there are too few to split.

        Returns:
            Items, int64 ``[T]``, and offsets, int64 ``[U + 1]``. No sequence is empty.
        """
        lengths = np.diff(self.offsets)
        return self._first(np.where(lengths >= MIN_EVENTS_TO_SPLIT, lengths - 2, lengths))

    def train_counts(self) -> np.ndarray:
        """Count the training events of every item: int64 ``[V]``."""
        return np.bincount(self.train_sequences()[0], minlength=self.num_items)

    def eval_cases(self, split: str) -> EvalCases:
        """Give the cases of a split, one for each user with three events or more.

        Args:
            split: ``valid`` (target: the last event but one) or ``test`` (target: the last event). The history is all that
                came before the target, so a test history ends with the validation target.
        """
        if split not in ("valid", "test"):
            raise InputError(f"split {split!r} is none of 'valid', 'test'")
        held_out = 2 if split == "valid" else 1
        lengths = np.diff(self.offsets)
        user_index = np.flatnonzero(lengths >= MIN_EVENTS_TO_SPLIT)
        items, offsets = self._first(np.where(lengths >= MIN_EVENTS_TO_SPLIT, lengths - held_out, 0))
        return EvalCases(
            history_items=items,
            history_offsets=np.append(offsets[user_index], len(items)),
            targets=self.items[self.offsets[user_index + 1] - held_out],
            user_index=user_index,
        )

    def case_blocks(self, split: str) -> Iterator[EvalCases]:
        """Give the cases of a split as evaluation takes them: all at once."""
        yield self.eval_cases(split)

    def users_at(self, places: np.ndarray) -> list:
        """Give the original ids of some users of the dataset."""
        return self.user_ids.take(pa.array(places)).to_pylist()

    def write_histories(self, path: str | Path, split: str) -> None:
        """Write the cases of a split with original ids, as a scoring job reads them.

        Parquet columns: ``user_id``, ``history`` (list of item ids in time order) and ``target``. The file appears whole.
        """
        cases = self.eval_cases(split)
        id_type = self.vocabulary.item_ids.type
        columns = [("user_id", self.user_ids.type), ("history", pa.list_(id_type)), ("target", id_type)]
        aside = aside_of(Path(path))
        try:
            with pq.ParquetWriter(aside, pa.schema(columns), compression="zstd") as writer:
                for start in range(0, len(cases.targets), _HISTORIES_PER_WRITE):
                    stop = min(start + _HISTORIES_PER_WRITE, len(cases.targets))
                    writer.write_batch(self._history_batch(cases, start, stop, writer.schema))
            publish(aside, Path(path))
        finally:
            aside.unlink(missing_ok=True)

    def _history_batch(self, cases: EvalCases, start: int, stop: int, schema: pa.Schema) -> pa.RecordBatch:
        offsets = cases.history_offsets[start : stop + 1]
        history = self.vocabulary.decode(cases.history_items[offsets[0] : offsets[-1]])
        columns = [
            self.user_ids.take(pa.array(cases.user_index[start:stop])),
            pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), history),
            self.vocabulary.decode(cases.targets[start:stop]),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _first(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut every sequence to its first ``lengths[u]`` items."""
        stops = np.repeat(self.offsets[:-1] + lengths, np.diff(self.offsets))
        return self.items[np.arange(len(self.items)) < stops], _offsets(lengths)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the dataset at ``path``.

    Raises:
        InputError: it is missing, is not JSON, lacks a key or has another schema version.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{str(file)!r} does not exist: {str(path)!r} is no prepared dataset; run launch/prepare first"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}; prepare the dataset again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{str(file)!r} has schema version {version!r}, this program reads {SCHEMA_VERSION}; prepare the dataset again"
        )
    missing = [key for key in ("vocabulary_sha256", "num_users", "num_items", "num_events", "parts") if key not in manifest]
    if missing:
        raise InputError(f"{str(file)!r} lacks {', '.join(map(repr, missing))}; prepare the dataset again")
    return manifest


def read_vocabulary(path: Path, manifest: dict[str, Any]) -> Vocabulary:
    """Read the vocabulary of the dataset at ``path``.

    Raises:
        InputError: it is missing or damaged, or belongs to another dataset.
    """
    vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
    if vocabulary.sha256 != manifest["vocabulary_sha256"]:
        raise InputError(
            f"{str(path / VOCABULARY_FILE)!r} has sha256 {vocabulary.sha256[:12]}…, the manifest says "
            f"{manifest['vocabulary_sha256'][:12]}…: it belongs to another dataset; prepare the dataset again"
        )
    return vocabulary


class Sequences(NamedTuple):
    """The users of a part of a dataset, or of some of its row groups."""

    user_ids: pa.Array
    """Original ids, ``[U]``."""
    lengths: np.ndarray
    """Number of events of each, int64 ``[U]``."""
    items: np.ndarray
    """Vocabulary indices of all, int64 ``[E]``."""


def _read_part(file: Path, part: dict[str, Any], num_items: int) -> Sequences:
    with reading_part(file):
        sequences = check_sequences(pq.read_table(file, columns=["user_id", "items"]), file, num_items)
    check_part(file, part, len(sequences.user_ids), len(sequences.items))
    return sequences


@contextmanager
def reading_part(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a part into an `InputError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{str(file)!r} is missing, but the manifest lists it; copy or prepare the dataset again") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}; copy or prepare the dataset again") from error


def check_part(file: Path, part: dict[str, Any], num_users: int, num_events: int) -> None:
    """Raise an `InputError` unless a part holds what the manifest says."""
    if (num_users, num_events) != (part["num_users"], part["num_events"]):
        raise InputError(
            f"{str(file)!r} holds {num_users} users with {num_events} events, the manifest says {part['num_users']} with "
            f"{part['num_events']}; copy or prepare the dataset again"
        )


def check_sequences(table: pa.Table, file: Path, num_items: int, first_row: int = 0) -> Sequences:
    """Take the columns ``user_id`` and ``items`` of a part apart, or of its rows from ``first_row`` on.

    Raises:
        InputError: a value is null, or no index of the vocabulary.
    """
    users, sequences = (column.combine_chunks() for column in table.select(["user_id", "items"]).columns)
    items = sequences.flatten()
    if items.type != pa.int64() or items.null_count or sequences.null_count or users.null_count:
        raise InputError(f"{str(file)!r} holds nulls, or items that are {items.type}, not int64; prepare the dataset again")
    lengths = pc.list_value_length(sequences).to_numpy().astype(np.int64)
    indices = items.to_numpy()
    outside = np.flatnonzero((indices < 0) | (indices >= num_items))
    if len(outside):
        row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
        raise InputError(
            f"{str(file)!r} holds item index {indices[outside[0]]} (user {users[row].as_py()!r}, row {first_row + row + 1}), "
            f"which is not in [0, {num_items}); prepare the dataset again"
        )
    return Sequences(users, lengths, indices)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
