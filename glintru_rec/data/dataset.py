"""A prepared dataset in memory, split leave-one-out; `glintru_rec.data.dataset_files` says of what files it is made.

A dataset prepared with ``ids=raw`` has no vocabulary: its items are places in a list of just the ids of these sequences.

Leave-one-out, for a user with events ``a b c d e``: train ``a b c``, validation target ``d``, test target ``e``. A user with
fewer than three events is for training only.

Shapes: E events, U users, V items of the catalog, C evaluation cases, F side features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.dataset_files import Sequences, is_raw, read_manifest, read_part, read_vocabulary
from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.files import aside_of, publish

MIN_EVENTS_TO_SPLIT = 3
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
        parts = [read_part(path / part["file"], part, manifest, vocabulary, side) for part in manifest["parts"]]
        return cls.join(manifest, vocabulary, parts, side)

    @classmethod
    def join(
        cls, manifest: dict[str, Any], vocabulary: Vocabulary, parts: list[Sequences], side: SideVocabulary = NO_SIDE
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


def _number_ids(ids: Sequence[pa.Array], places: Sequence[np.ndarray]) -> tuple[Vocabulary, list[np.ndarray]]:
    """Join the ids of several parts, and say of each part's items where they are in all parts' ids."""
    joined = pa.chunked_array(ids).dictionary_encode().combine_chunks()
    ends = np.cumsum([len(each) for each in ids])[:-1]
    numbers = np.split(joined.indices.to_numpy().astype(np.int64), ends)
    items = [of_part[own] for of_part, own in zip(numbers, places, strict=True)]
    return Vocabulary(joined.dictionary, np.bincount(np.concatenate(items), minlength=len(joined.dictionary))), items


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
