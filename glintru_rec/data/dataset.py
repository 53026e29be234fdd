"""A prepared dataset: open it, check it, and split it leave-one-out.

::

    manifest.json                    counts, filters, what was set aside, vocabulary fingerprint, the list of parts
    vocabulary/items.parquet         item_id, index, count
    vocabulary/side_features.json    the values of side features, where there are any (see `side_features`)
    sequences/part-00000.parquet     user_id, items: list<int64>, timestamps: list<int64>, positions: list<int64> (rows of the
                                     log, from 0), and side:NAME: list<int16> for each side feature; users as they first
                                     appear in the log
    rare.parquet                     position, user_id, item_id, timestamp of the events of rare users and items
    set_aside.parquet                every row of the log that could not be used, with its reason

Prepared with ``ids=raw``, a dataset has no vocabulary: the items of its sequences are ids as the log has them, int64 or
strings. Where some of its sequences are in memory, their items are places in a list of just their ids.

Leave-one-out, for a user with events ``a b c d e``: train ``a b c``, validation target ``d``, test target ``e``. A user with
fewer than three events is for training only.

Shapes: E events, U users, V items of the catalog, C evaluation cases, F side features.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.config import wrong_keys
from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.files import aside_of, publish

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary/items.parquet"
RARE_FILE = "rare.parquet"
SET_ASIDE_FILE = "set_aside.parquet"
SIDE_TYPE = pa.int16()
MIN_EVENTS_TO_SPLIT = 3
_KINDS = {"vocabulary_sha256": str, "num_users": int, "num_items": int, "num_events": int, "parts": list}
_RAW_KINDS = {"sequences_sha256": str, "num_users": int, "item_id_type": str, "num_events": int, "parts": list}
_PART_KINDS = {"file": str, "num_users": int, "num_events": int}
_HISTORIES_PER_WRITE = 1 << 16


@dataclass(frozen=True, eq=False)
class EvalCases:
    """The cases of one split: each asks for the item that follows a history.

    Attributes:
        history_items: the histories, one after the other, in time order, int64 ``[T]``.
        history_offsets: where each starts, int64 ``[C + 1]``, from 0 to T. No history of a `SequenceDataset` is empty.
        targets: the items that followed, int64 ``[C]``; -1 where the model does not know it (see `glintru_rec.data.admitted`).
        user_index: the place of each case's user in the dataset, int64 ``[C]``, ascending.
        history_side: side features of the histories' events, int16 ``[T, F]``; None where none were read.
        ids: original ids of which items are the places; None where they are rows of a table.
    """

    history_items: np.ndarray
    history_offsets: np.ndarray
    targets: np.ndarray
    user_index: np.ndarray
    history_side: np.ndarray | None = None
    ids: pa.Array | None = None


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """All sequences of a prepared dataset, in memory.

    Attributes:
        manifest: what ``manifest.json`` holds.
        vocabulary: original item id ↔ index; its fingerprint is the manifest's. Of raw ids, those of these very sequences.
        user_ids: original user ids ``[U]``, int64 or string.
        items: vocabulary indices of all users, one after the other, in time order, int64 ``[E]``, all in ``[0, V)``.
        offsets: where each user starts in ``items``, int64 ``[U + 1]``, from 0 to E.
        side: the side features that were read, F of them.
        side_ids: their values' indices, beside ``items``, int16 ``[E, F]``; None where none were read.
    """

    manifest: dict[str, Any]
    vocabulary: Vocabulary
    user_ids: pa.Array
    items: np.ndarray
    offsets: np.ndarray
    side: SideVocabulary = NO_SIDE
    side_ids: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path, side_features: Sequence[str] = ()) -> "SequenceDataset":
        """Read a dataset and check that it is whole.

        Args:
            path: its folder.
            side_features: which to read besides the items.

        Raises:
            InputError: a file is missing or corrupt, or the files do not belong together, or there is no such side feature.
        """
        path = Path(path)
        manifest = read_manifest(path)
        vocabulary, side = read_vocabulary(path, manifest), SideVocabulary.load(path).choose(side_features)
        parts = [_read_part(path / part["file"], part, manifest, vocabulary, side) for part in manifest["parts"]]
        return cls.join(manifest, vocabulary, parts, side)

    @classmethod
    def join(
        cls, manifest: dict[str, Any], vocabulary: Vocabulary, parts: "list[Sequences]", side: SideVocabulary = NO_SIDE
    ) -> "SequenceDataset":
        """Make a dataset of some sequences, one part after the other; of raw ids, ``vocabulary`` is not looked at."""
        user_ids, lengths, places, side_ids, ids = zip(*parts)
        items: Sequence[np.ndarray] = places
        if is_raw(manifest):
            vocabulary, items = _number_ids(ids, places)
        return cls(
            manifest,
            vocabulary,
            pa.concat_arrays(user_ids),
            np.concatenate(items),
            _offsets(np.concatenate(lengths)),
            side,
            np.concatenate(side_ids) if side.names else None,
        )

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
        lengths = self._train_lengths()
        return self.items[self._is_first(lengths)], _offsets(lengths)

    def train_side_ids(self) -> np.ndarray | None:
        """Give the side features of the events of `train_sequences`: int16 ``[T, F]``; None where none were read."""
        return None if self.side_ids is None else self.side_ids[self._is_first(self._train_lengths())]

    def train_blocks(self) -> "Iterator[SequenceDataset]":
        """Give the dataset in parts that are in memory: itself."""
        yield self

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
        kept = np.where(lengths >= MIN_EVENTS_TO_SPLIT, lengths - held_out, 0)
        in_history, offsets = self._is_first(kept), _offsets(kept)
        return EvalCases(
            history_items=self.items[in_history],
            history_offsets=np.append(offsets[user_index], offsets[-1]),
            targets=self.items[self.offsets[user_index + 1] - held_out],
            user_index=user_index,
            history_side=None if self.side_ids is None else self.side_ids[in_history],
            ids=self.vocabulary.item_ids,
        )

    def case_blocks(self, split: str) -> Iterator[EvalCases]:
        """Give the cases of a split as evaluation takes them: all at once."""
        yield self.eval_cases(split)

    def users_at(self, places: np.ndarray) -> list:
        """Give the original ids of some users of the dataset."""
        return self.user_ids.take(pa.array(places)).to_pylist()

    def write_histories(self, path: str | Path, split: str) -> None:
        """Write histories with original ids, as a scoring job reads them.

        Parquet columns: ``user_id``, ``history`` (list of item ids in time order), ``target`` (not with ``all``), and under the
        name of each side feature that was read the list of its values. The file appears whole.

        Args:
            path: of the file.
            split: the cases of ``valid`` or ``test``; or ``all``, every user's whole history.
        """
        cases = self._whole_histories() if split == "all" else self.eval_cases(split)
        id_type = self.vocabulary.item_ids.type
        columns = [("user_id", self.user_ids.type), ("history", pa.list_(id_type))]
        columns += [("target", id_type)] * (split != "all")
        columns += [(name, pa.list_(pa.string())) for name in self.side.names]
        aside = aside_of(Path(path))
        try:
            with pq.ParquetWriter(aside, pa.schema(columns), compression="zstd") as writer:
                for start in range(0, len(cases.targets), _HISTORIES_PER_WRITE):
                    stop = min(start + _HISTORIES_PER_WRITE, len(cases.targets))
                    writer.write_batch(self._history_batch(cases, start, stop, writer.schema))
            publish(aside, Path(path))
        finally:
            aside.unlink(missing_ok=True)

    def _whole_histories(self) -> EvalCases:
        """Give what every user has done; nobody knows what follows."""
        unknown = np.full(self.num_users, -1)
        return EvalCases(self.items, self.offsets, unknown, np.arange(self.num_users), self.side_ids)

    def _history_batch(self, cases: EvalCases, start: int, stop: int, schema: pa.Schema) -> pa.RecordBatch:
        offsets = cases.history_offsets[start : stop + 1]
        events, lists = slice(offsets[0], offsets[-1]), pa.array(offsets - offsets[0], pa.int32())
        columns = [
            self.user_ids.take(pa.array(cases.user_index[start:stop])),
            pa.ListArray.from_arrays(lists, self.vocabulary.decode(cases.history_items[events])),
        ]
        if "target" in schema.names:
            columns.append(self.vocabulary.decode(cases.targets[start:stop]))
        if cases.history_side is not None:
            values = zip(self.side.names, cases.history_side[events].T)
            columns += [pa.ListArray.from_arrays(lists, self.side.decode(name, indices)) for name, indices in values]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _train_lengths(self) -> np.ndarray:
        lengths = np.diff(self.offsets)
        return np.where(lengths >= MIN_EVENTS_TO_SPLIT, lengths - 2, lengths)

    def _is_first(self, lengths: np.ndarray) -> np.ndarray:
        """Say which events are among the first ``lengths[u]`` of their user: bool ``[E]``."""
        return np.arange(len(self.items)) < np.repeat(self.offsets[:-1] + lengths, np.diff(self.offsets))


def side_column(name: str) -> str:
    """Name the column of a side feature in the files of sequences."""
    return f"side:{name}"


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
    wrong = wrong_keys(manifest, _RAW_KINDS if is_raw(manifest) else _KINDS)
    if is_raw(manifest) and not wrong and manifest["item_id_type"] not in ("int64", "string"):
        wrong = ["item_id_type"]
    if wrong or not all(isinstance(part, dict) and not wrong_keys(part, _PART_KINDS) for part in manifest["parts"]):
        named = ", ".join(map(repr, wrong or ["parts"]))
        raise InputError(f"{str(file)!r} lacks {named}, or has values of another kind there; prepare the dataset again")
    return manifest


def is_raw(manifest: dict[str, Any]) -> bool:
    """Whether a dataset's items are ids as the log has them, not indices."""
    return manifest.get("ids") == "raw"


def fingerprint(manifest: dict[str, Any]) -> str:
    """Give the checksum of what items mean in a dataset: of its vocabulary, or where it has raw ids of its sequences."""
    return manifest["sequences_sha256" if is_raw(manifest) else "vocabulary_sha256"]


def read_vocabulary(path: Path, manifest: dict[str, Any]) -> Vocabulary:
    """Read the vocabulary of the dataset at ``path``; give one without items where it has raw ids.

    Raises:
        InputError: it is missing or damaged, or belongs to another dataset.
    """
    if is_raw(manifest):
        return Vocabulary(pa.array([], manifest["item_id_type"]), np.zeros(0, np.int64))
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
    """Vocabulary indices of all, or places in ``ids``, int64 ``[E]``."""
    side_ids: np.ndarray
    """Side features of all, int16 ``[E, F]``."""
    ids: pa.Array | None = None
    """Where they are raw, the ids of all, each once."""


def columns_of(side: SideVocabulary) -> list[str]:
    """Name the columns of a part that are read."""
    return ["user_id", "items", *map(side_column, side.names)]


def _read_part(
    file: Path, part: dict[str, Any], manifest: dict[str, Any], vocabulary: Vocabulary, side: SideVocabulary
) -> Sequences:
    with reading_part(file):
        sequences = check_sequences(pq.read_table(file, columns=columns_of(side)), file, manifest, vocabulary, side)
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


def check_sequences(
    table: pa.Table,
    file: Path,
    manifest: dict[str, Any],
    vocabulary: Vocabulary,
    side: SideVocabulary = NO_SIDE,
    first_row: int = 0,
) -> Sequences:
    """Take the columns ``user_id``, ``items`` and side features of a part apart, or of its rows from ``first_row`` on.

    Raises:
        InputError: a value is null, or no index of the vocabulary, or no raw id of the dataset's type.
    """
    users, sequences = (column.combine_chunks() for column in table.select(["user_id", "items"]).columns)
    items = sequences.flatten()
    kind = vocabulary.id_type if is_raw(manifest) else "int64"
    if str(items.type) != kind or items.null_count or sequences.null_count or users.null_count:
        raise InputError(f"{str(file)!r} holds nulls, or items that are {items.type}, not {kind}; prepare the dataset again")
    lengths = pc.list_value_length(sequences).to_numpy().astype(np.int64)
    if is_raw(manifest):
        raw = items.dictionary_encode()
        places = raw.indices.to_numpy().astype(np.int64)
        return Sequences(users, lengths, places, _side_ids(table, file, side, len(places)), raw.dictionary)
    indices, num_items = items.to_numpy(), vocabulary.num_items
    outside = np.flatnonzero((indices < 0) | (indices >= num_items))
    if len(outside):
        row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
        raise InputError(
            f"{str(file)!r} holds item index {indices[outside[0]]} (user {users[row].as_py()!r}, row {first_row + row + 1}), "
            f"which is not in [0, {num_items}); prepare the dataset again"
        )
    return Sequences(users, lengths, indices, _side_ids(table, file, side, len(indices)))


def _number_ids(ids: Sequence[pa.Array], places: Sequence[np.ndarray]) -> tuple[Vocabulary, list[np.ndarray]]:
    """Join the ids of several parts, and say of each part's items where they are in all parts' ids."""
    joined = pa.chunked_array(ids).dictionary_encode().combine_chunks()
    ends = np.cumsum([len(each) for each in ids])[:-1]
    numbers = np.split(joined.indices.to_numpy().astype(np.int64), ends)
    items = [of_part[own] for of_part, own in zip(numbers, places, strict=True)]
    return Vocabulary(joined.dictionary, np.bincount(np.concatenate(items), minlength=len(joined.dictionary))), items


def _side_ids(table: pa.Table, file: Path, side: SideVocabulary, num_events: int) -> np.ndarray:
    """Take the side features of a part apart: int16 ``[E, F]``."""
    ids = np.empty((num_events, len(side.names)), np.int16)
    for place, (name, size) in enumerate(zip(side.names, side.sizes)):
        column = table[side_column(name)].combine_chunks().flatten()
        is_whole = column.type == SIDE_TYPE and not column.null_count and len(column) == num_events
        if not is_whole or (num_events and not 0 <= pc.min(column).as_py() <= pc.max(column).as_py() < size):
            raise InputError(
                f"{str(file)!r} holds no index in [0, {size}) of side feature {name!r} for each event; "
                f"prepare the dataset again"
            )
        ids[:, place] = column.to_numpy()
    return ids


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
