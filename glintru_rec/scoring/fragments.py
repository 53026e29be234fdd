"""The input of a scoring job: parquet files, all checked before the first is read."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.formats import find_files
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.scoring.rows import Columns, Rows, decode

_STRINGS = ("string", "large_string", "string_view")
# Read column chunks piece by piece; by default pyarrow takes a row group's whole column into memory.
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Fragment:
    """One parquet file of the input.

    Attributes:
        path: where it is.
        name: of the output file; it ends in ``.parquet`` and is unique in the input.
        columns: what is read of it.
        num_rows: as its footer says.
        user_type: type of the user ids.
    """

    path: Path
    name: str
    columns: Columns
    num_rows: int
    user_type: pa.DataType

    def read(self, batch_size: int, vocabulary: Vocabulary) -> Iterator[Rows]:
        """Read at most ``batch_size`` rows at a time.

        Raises:
            InputError: the file is damaged.
        """
        first_row = 1
        for batch in self._batches(batch_size):
            yield decode(batch, self.columns, vocabulary, self.name, first_row)
            first_row += len(batch)

    def _batches(self, batch_size: int) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.path, buffer_size=_READ_BYTES) as file:
                yield from file.iter_batches(batch_size, columns=[name for name in self.columns if name is not None])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{str(self.path)!r} cannot be read: {error}; write or copy it again") from error


def open_fragments(location: str, columns: Columns, vocabulary: Vocabulary) -> list[Fragment]:
    """Find the files of the input and check them all before any is scored.

    Args:
        location: a parquet file, a folder of them (searched to the bottom; names that start with ``.`` or ``_`` are
            skipped) or a glob pattern.
        columns: what they must have.
        vocabulary: whose ids they must hold.

    Raises:
        InputError: no file or no row; a file that is not readable parquet, lacks a column, or has one of another type.
    """
    paths = find_files(location)
    common = os.path.commonpath([path.parent for path in paths])
    fragments: dict[str, Fragment] = {}
    for path in paths:
        # The output is flat, so that one pattern, *.parquet, finds all of it: a sub-folder becomes part of the name.
        name = "__".join(path.relative_to(common).parts).removesuffix(".parquet") + ".parquet"
        if name in fragments:
            raise InputError(f"{str(fragments[name].path)!r} and {str(path)!r} would both be written as {name!r}; rename one")
        fragments[name] = _open(path, name, columns, vocabulary)
    if not any(fragment.num_rows for fragment in fragments.values()):
        raise InputError(f"input {location!r} holds no rows: {len(paths)} file(s), all empty")
    return list(fragments.values())


def _open(path: Path, name: str, columns: Columns, vocabulary: Vocabulary) -> Fragment:
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{str(path)!r} is not readable parquet: {error}; the input is parquet files only") from error
    for column in columns:
        if column is not None and column not in schema.names:
            raise InputError(
                f"{str(path)!r} has no column {column!r}; it has {', '.join(map(repr, schema.names))}. "
                f"Name the right ones with user_column, history_column and candidates_column"
            )
    user_type = _plain(schema.field(columns.user).type)
    if not pa.types.is_integer(user_type) and str(user_type) not in _STRINGS:
        raise InputError(f"column {columns.user!r} of {str(path)!r} has type {user_type}; it must hold integers or strings")
    for column in (columns.history, columns.candidates):
        if column is not None and not _holds_ids(schema.field(column).type, vocabulary):
            raise InputError(
                f"column {column!r} of {str(path)!r} has type {schema.field(column).type}; the vocabulary holds "
                f"{vocabulary.id_type} item ids, so write it as list<{vocabulary.id_type}>"
            )
    return Fragment(path, name, columns, num_rows, user_type)


def _holds_ids(kind: pa.DataType, vocabulary: Vocabulary) -> bool:
    """Say whether a column is made of lists of the vocabulary's ids."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = _plain(kind.value_type)
    if pa.types.is_null(item):  # all lists of the file are empty, or hold nulls alone
        return True
    return pa.types.is_integer(item) if vocabulary.id_type == "int64" else str(item) in _STRINGS


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
