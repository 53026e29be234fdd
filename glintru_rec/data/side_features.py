"""Side features of events (action type, category, rating, …): what values each has, and which row of its table is whose."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glintru_rec.errors import InputError
from glintru_rec.files import write_json

SIDE_FILE = "vocabulary/side_features.json"
MAX_VALUES = 10_000
"""Most values of a feature: its table is whole on every rank, and trained densely."""
_STRINGS = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class SideVocabulary:
    """The values of side features, as text.

    A value's index is its place + 1; index 0 is for null, for the empty text and for values that are not in the list.

    Attributes:
        values: feature → values, in the order of the features.

    Example:
        >>> vocabulary = SideVocabulary({"rating": ["5", "4"]})
        >>> vocabulary.encode("rating", pa.array([4, 5, 1, None]))
        array([2, 1, 0, 0])
    """

    values: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> "SideVocabulary":
        """Read ``vocabulary/side_features.json`` of a dataset, a run or an artifact; without one there are no features.

        Raises:
            InputError: the file is no such vocabulary.
        """
        path = Path(folder) / SIDE_FILE
        try:
            values = json.loads(path.read_text())
            if not all(isinstance(value, str) for each in values.values() for value in each):
                raise ValueError("a value is no text")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}; prepare the dataset again") from error
        return cls(values)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads; nothing where there are no features."""
        if self.values:
            write_json(Path(folder) / SIDE_FILE, self.values)

    @property
    def names(self) -> list[str]:
        """The features."""
        return list(self.values)

    @property
    def sizes(self) -> list[int]:
        """How many rows the table of each feature has, the one for unknown values among them."""
        return [len(values) + 1 for values in self.values.values()]

    def choose(self, names: Sequence[str]) -> "SideVocabulary":
        """Keep some of the features, in the order given.

        Raises:
            InputError: there is no such feature.
        """
        for name in names:
            if name not in self.values:
                has = f"it has {', '.join(self.values)}" if self.values else "it was prepared without any"
                raise InputError(f"the dataset has no side feature {name!r}; {has} (side_columns of launch/prepare.py)")
        return SideVocabulary({name: self.values[name] for name in names})

    def encode(self, name: str, column: pa.Array) -> np.ndarray:
        """Give the index of every value of a feature.

        Args:
            name: of the feature.
            column: whole numbers, booleans or strings ``[N]``.

        Returns:
            int64 ``[N]``.

        Raises:
            InputError: the values are of another type.
        """
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not is_categorical(column.type):
            raise InputError(f"side feature {name!r} holds {column.type}; {CATEGORICAL}")
        return rows_of(column.cast(pa.string()), pa.array(self.values[name], pa.string()))

    def decode(self, name: str, indices: np.ndarray) -> pa.Array:
        """Give the value of every index, null for 0: string ``[N]``."""
        values = pa.array([None, *self.values[name]], pa.string())
        return values.take(pa.array(indices, pa.int64()))


def rows_of(column: pa.Array, values: pa.Array) -> np.ndarray:
    """Give the row of every value in a table of small features: its place in ``values`` + 1, 0 if null or not there.

    Args:
        column: ``[N]``.
        values: of the same type, none twice.

    Returns:
        int64 ``[N]``.
    """
    places = pc.index_in(column, value_set=values, skip_nulls=True)
    return places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1


NO_SIDE = SideVocabulary()
CATEGORICAL = "write whole numbers, booleans or strings (a number with a fraction: in buckets, or as text)"


def is_categorical(kind: pa.DataType) -> bool:
    """Say whether values of a type can be told apart by what they look like as text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind) or str(kind) in _STRINGS
