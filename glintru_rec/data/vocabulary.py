"""The catalog: which item id is which row of the item table."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.data.lookup import IntegerLookup, TextLookup
from glintru_rec.errors import InputError
from glintru_rec.files import aside_of, publish

_COLUMNS = ("item_id", "index", "count")


class Vocabulary:
    """Original item ids with their indices and counts. The index is the place in ``item_ids``, from 0.

    ``decode(encode(ids))`` gives ``ids`` back for every id of the catalog. Ids are int64 or strings, and
    never pass through a float.

    Args:
        item_ids: the original ids in index order, each once, int64 or string.
        counts: the number of events of each item, int64 ``[num_items]``.

    Example:
        >>> Vocabulary(pa.array([30, 10]), np.array([5, 2])).encode(np.array([10, 99, 30]))
        array([ 1, -1,  0])
    """

    def __init__(self, item_ids: pa.Array, counts: np.ndarray) -> None:
        if item_ids.type not in (pa.int64(), pa.string()):
            raise InputError(f"item ids are int64 or string, not {item_ids.type}")
        self.item_ids = item_ids
        self.counts = counts

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is no vocabulary.
        """
        try:
            table = pq.read_table(path).select(_COLUMNS)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(f"vocabulary {str(path)!r} cannot be read: {error}; prepare the dataset again") from error
        item_ids, index, counts = (column.combine_chunks() for column in table.columns)
        if any(column.null_count for column in (item_ids, index, counts)) or not np.array_equal(index, np.arange(len(table))):
            raise InputError(f"vocabulary {str(path)!r} does not number its items 0, 1, 2, ...; prepare the dataset again")
        return cls(item_ids, counts.to_numpy())

    def save(self, path: str | Path) -> None:
        """Write parquet with columns ``item_id``, ``index`` (int64) and ``count`` (int64), sorted by index."""
        columns = [self.item_ids, pa.array(np.arange(self.num_items)), pa.array(self.counts, pa.int64())]
        aside = aside_of(Path(path))
        try:
            pq.write_table(pa.table(columns, names=list(_COLUMNS)), aside, compression="zstd")
            publish(aside, Path(path))
        finally:
            aside.unlink(missing_ok=True)

    @property
    def num_items(self) -> int:
        """Number of items in the catalog."""
        return len(self.item_ids)

    @property
    def id_type(self) -> str:
        """``int64`` or ``string``."""
        return str(self.item_ids.type)

    def first(self, num_items: int) -> "Vocabulary":
        """Give the catalog of the first ``num_items`` items, or of all where there are fewer."""
        return Vocabulary(self.item_ids.slice(0, num_items), self.counts[:num_items])

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the ids, their type and their order; the same on every machine. Counts do not enter."""
        digest = hashlib.sha256(f"{self.id_type}\n{self.num_items}\n".encode())
        if self.id_type == "int64":
            digest.update(self.item_ids.to_numpy().astype("<i8").tobytes())
        else:
            # With the lengths in front, no two lists of strings give the same bytes.
            digest.update(pc.binary_length(self.item_ids).to_numpy().astype("<i8").tobytes())
            for start in range(0, self.num_items, 1 << 20):
                digest.update("".join(self.item_ids.slice(start, 1 << 20).to_pylist()).encode())
        return digest.hexdigest()

    def encode(self, ids: pa.Array | pa.ChunkedArray | np.ndarray) -> np.ndarray:
        """Give the index of every id.

        Args:
            ids: original ids ``[N]``: integers of any width for an int64 vocabulary, strings for a string one.

        Returns:
            int64 ``[N]``; -1 where the vocabulary does not have the id, or the id is null.

        Raises:
            InputError: the ids are of the other type.
        """
        values = ids if isinstance(ids, (pa.Array, pa.ChunkedArray)) else pa.array(ids)
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_null(values.type):
            return np.full(len(values), -1)
        is_text = str(values.type) in ("string", "large_string", "string_view")
        if not (is_text if self.id_type == "string" else pa.types.is_integer(values.type)):
            first = f" (first {values[0].as_py()!r})" if len(values) else ""
            what = f"the vocabulary holds {self.id_type} item ids, but these are {values.type}{first}"
            raise InputError(f"{what}; write them as {self.id_type}")
        return self._encode_text(values) if is_text else self._encode_integers(values)

    def decode(self, indices: np.ndarray) -> pa.Array:
        """Give the original id of every index.

        Raises:
            InputError: an index is not in ``[0, num_items)``.
        """
        indices = np.asarray(indices)
        try:
            return self.item_ids.take(pa.array(indices, pa.int64()))
        except pa.ArrowIndexError as error:
            place = int(((indices < 0) | (indices >= self.num_items)).argmax())
            what = f"index {indices[place]} at place {place} is not in [0, {self.num_items}): no such item"
            raise InputError(what) from error

    @cached_property
    def _lookup(self) -> IntegerLookup | TextLookup:
        return TextLookup(self.item_ids) if self.id_type == "string" else IntegerLookup(self.item_ids.to_numpy())

    def _encode_integers(self, values: pa.Array) -> np.ndarray:
        assert isinstance(self._lookup, IntegerLookup)
        # Nulls are filled first: with nulls inside, numpy would be given floats.
        numbers = (values.fill_null(0) if values.null_count else values).to_numpy(zero_copy_only=False)
        places = self._lookup.find(numbers.astype(np.int64, copy=False))
        if values.null_count:
            places[values.is_null().to_numpy(zero_copy_only=False)] = -1
        if numbers.dtype == np.uint64:
            places[numbers > np.iinfo(np.int64).max] = -1
        return places

    def _encode_text(self, values: pa.Array) -> np.ndarray:
        assert isinstance(self._lookup, TextLookup)
        return self._lookup.find(values.cast(pa.string()))
