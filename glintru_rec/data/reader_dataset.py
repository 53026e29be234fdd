"""A prepared dataset that stays on the disk: its row groups, read when they are asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from glintru_rec.data.dataset import EvalCases, SequenceDataset
from glintru_rec.data.dataset_files import (
    Sequences,
    check_part,
    check_sequences,
    columns_of,
    read_manifest,
    read_vocabulary,
    reading_part,
)
from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError


class RowGroup(NamedTuple):
    """Where some users of a dataset lie."""

    file: Path
    number: int
    """Of the row group in the file."""
    first_row: int
    """Row of the file where it begins."""
    num_users: int
    num_events: int


@dataclass(frozen=True, eq=False)
class RowGroupDataset:
    """A dataset of which a few row groups are in memory at a time; its vocabulary, if it has one, is there whole.

    Attributes:
        manifest: what ``manifest.json`` holds.
        vocabulary: original item id ↔ index; without items where the dataset has raw ids.
        row_groups: of all parts, in order, as their footers tell.
        row_groups_held: how many are read at a time.
        side: the side features that are read.
    """

    manifest: dict[str, Any]
    vocabulary: Vocabulary
    row_groups: Sequence[RowGroup]
    row_groups_held: int
    side: SideVocabulary = NO_SIDE

    @classmethod
    def open(cls, path: str | Path, row_groups_held: int, side_features: Sequence[str] = ()) -> "RowGroupDataset":
        """Read all but the sequences; these are checked as they are read.

        Raises:
            InputError: a file is missing or corrupt, or the files do not belong together.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if "users_too_short_to_split" not in manifest:
            raise InputError(f"{str(path)!r} does not say how many users are too short to split; prepare the dataset again")
        vocabulary = read_vocabulary(path, manifest)
        row_groups = [group for part in manifest["parts"] for group in list_row_groups(path / part["file"], part)]
        return cls(manifest, vocabulary, row_groups, row_groups_held, SideVocabulary.load(path).choose(side_features))

    @property
    def num_items(self) -> int:
        """Number of items in the catalog, V."""
        return self.vocabulary.num_items

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return self.manifest["num_users"]

    @property
    def num_cases(self) -> int:
        """Number of users that evaluation asks for, C."""
        return self.num_users - self.manifest["users_too_short_to_split"]

    @property
    def first_users(self) -> np.ndarray:
        """Where the users of each row group begin among all: int64 ``[row groups]``."""
        return np.cumsum([0] + [group.num_users for group in self.row_groups[:-1]])

    def read(self, numbers: Sequence[int]) -> SequenceDataset:
        """Read some row groups into memory, one after the other.

        Raises:
            InputError: a file is gone or corrupt, or holds what the vocabulary does not have.
        """
        parts = [self._read(self.row_groups[number]) for number in numbers]
        return SequenceDataset.join(self.manifest, self.vocabulary, parts, self.side)

    def train_blocks(self) -> Iterator[SequenceDataset]:
        """Give the dataset in parts that are in memory, a row group each."""
        for number in range(len(self.row_groups)):
            yield self.read([number])

    def train_counts(self, numbers: Sequence[int] | None = None) -> np.ndarray:
        """Count the training events of every item of the vocabulary, in all row groups or some: int64 ``[V]``. Reads them."""
        counts = np.zeros(self.num_items, np.int64)
        for number in range(len(self.row_groups)) if numbers is None else numbers:
            np.add.at(counts, self.read([number]).train_sequences()[0], 1)
        return counts

    def case_blocks(self, split: str) -> Iterator[EvalCases]:
        """Read the cases of a split, those of ``row_groups_held`` row groups at a time, in the order of users."""
        first_users = self.first_users
        for first in range(0, len(self.row_groups), self.row_groups_held):
            numbers = range(first, min(first + self.row_groups_held, len(self.row_groups)))
            cases = self.read(numbers).eval_cases(split)
            yield replace(cases, user_index=cases.user_index + first_users[first])

    def users_at(self, places: np.ndarray) -> list:
        """Give the original ids of some users of the dataset; reads the row groups that they are in."""
        first_users = self.first_users
        numbers = np.searchsorted(first_users, places, side="right") - 1
        blocks = {number: self.read([number]) for number in set(numbers.tolist())}
        return [
            blocks[number].user_ids[place - int(first_users[number])].as_py()
            for number, place in zip(numbers.tolist(), places.tolist())
        ]

    def _read(self, group: RowGroup) -> Sequences:
        with reading_part(group.file), pq.ParquetFile(group.file) as file:
            table = file.read_row_group(group.number, columns=columns_of(self.side))
            return check_sequences(table, group.file, self.manifest, self.vocabulary, self.side, group.first_row)


def list_row_groups(file: Path, part: dict[str, Any]) -> list[RowGroup]:
    """List the row groups of a part by its footer.

    Raises:
        InputError: it cannot be read, or holds other numbers of users and events than the manifest's ``part`` says.
    """
    with reading_part(file):
        footer = pq.read_metadata(file)
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        columns = [group.column(place) for group in groups for place in range(group.num_columns)]
        events = [column.num_values for column in columns if column.path_in_schema.split(".")[0] == "items"]
        if len(events) != len(groups):
            raise KeyError("items")
    users = [group.num_rows for group in groups]
    check_part(file, part, sum(users), sum(events))
    return [RowGroup(file, *each) for each in zip(range(len(groups)), accumulate([0, *users]), users, events)]
