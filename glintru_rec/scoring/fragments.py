"""The input of a scoring job: parquet files, all opened before the first is read."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.formats import find_files
from glintru_rec.data.side_features import CATEGORICAL, NO_SIDE, SideVocabulary, is_categorical
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.scoring.rows import Columns, Limits, Rows, decode

_STRINGS = ("string", "large_string", "string_view")
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of damaged names of columns
# Read column chunks piece by piece; by default pyarrow takes a row group's whole column into memory.
_READ_BYTES = 1 << 20
# Rows are read a few at a time, and joined to batches of at most so many list items: lists may be long, and short ones follow.
_PIECE_ROWS = 32
_BATCH_ITEMS = 1 << 21


class Stamp(NamedTuple):
    """What tells that a file is still the one that it was, without reading it."""

    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Look at a file."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class InputFile:
    """One file of the input, not yet opened.

    Attributes:
        path: where it is.
        name: of the output file; it ends in ``.parquet`` and is unique in the input.
        stamp: before anything was read of it.
    """

    path: Path
    name: str
    stamp: Stamp


@dataclass(frozen=True)
class Fragment:
    """One parquet file of the input, found usable.

    Attributes:
        file: which.
        columns: what is read of it.
        num_rows: as its footer says.
        user_type: type of the user ids.
    """

    file: InputFile
    columns: Columns
    num_rows: int
    user_type: pa.DataType

    def read(self, batch_size: int, vocabulary: Vocabulary, limits: Limits, side: SideVocabulary = NO_SIDE) -> Iterator[Rows]:
        """Read at most ``batch_size`` rows at a time, and fewer where their lists are long.

        Raises:
            InputError: the file is damaged, or not the one that was opened.
        """
        first_row = 1
        for batch in self.batches(batch_size):
            yield decode(batch, self.columns, vocabulary, self.file.name, first_row, limits, side)
            first_row += len(batch)

    def batches(self, batch_size: int) -> Iterator[pa.RecordBatch]:
        """Read at most ``batch_size`` rows at a time, as they are (see `read`)."""
        path = self.file.path
        try:
            with pq.ParquetFile(path, buffer_size=_READ_BYTES, page_checksum_verification=True) as file:
                piece = math.ceil(batch_size / math.ceil(batch_size / _PIECE_ROWS))
                yield from self._joined(self._pieces(file, piece), batch_size)
            stamp = Stamp.of(path)
        except _UNREADABLE as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}; write or copy it again") from error
        if stamp != self.file.stamp:
            raise InputError(f"{str(path)!r} was changed while it was read; run the job again when it is complete")

    def _pieces(self, file: pq.ParquetFile, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Read ``num_rows`` rows at a time, and fewer at the end of a row group."""
        # Each row group has dictionaries of its own, and pyarrow cannot read a list of two of them into one batch.
        columns = [self.columns.user, *self.columns.lists, *self.columns.side]
        for group in range(file.num_row_groups):
            yield from file.iter_batches(num_rows, row_groups=[group], columns=columns)

    def _joined(self, pieces: Iterator[pa.RecordBatch], batch_size: int) -> Iterator[pa.RecordBatch]:
        """Join pieces to batches; only a piece alone may be larger than a batch."""
        group: list[pa.RecordBatch] = []
        num_rows = num_items = 0
        for piece in pieces:
            items = sum(len(piece.column(name).flatten()) for name in self.columns.lists)
            if group and (num_rows + len(piece) > batch_size or num_items + items > _BATCH_ITEMS):
                yield _one(group)
                group, num_rows, num_items = [], 0, 0
            group.append(piece)
            num_rows += len(piece)
            num_items += items
        if group:
            yield _one(group)


def _one(pieces: list[pa.RecordBatch]) -> pa.RecordBatch:
    (batch,) = pa.Table.from_batches(pieces).combine_chunks().to_batches()
    return batch


def find_inputs(location: str) -> list[InputFile]:
    """Find the files of the input.

    Args:
        location: a parquet file, a folder of them (searched to the bottom; names that start with ``.`` or ``_`` are
            skipped) or a glob pattern.

    Raises:
        InputError: no file, or two that would be written under one name.
    """
    paths = find_files(location)
    common = os.path.commonpath([path.parent for path in paths])
    files: dict[str, InputFile] = {}
    for path in paths:
        # The output is flat, so that one pattern, *.parquet, finds all of it: a sub-folder becomes part of the name.
        name = "__".join(path.relative_to(common).parts).removesuffix(".parquet") + ".parquet"
        if name in files:
            raise InputError(f"{str(files[name].path)!r} and {str(path)!r} would both be written as {name!r}; rename one")
        files[name] = InputFile(path, name, Stamp.of(path))
    return list(files.values())


def open_fragments(files: list[InputFile], columns: Columns, vocabulary: Vocabulary) -> dict[str, Fragment | InputError]:
    """Open all files of the input before any is scored.

    Args:
        files: of the input.
        columns: what they must have.
        vocabulary: whose ids they must hold.

    Returns:
        See `open_all`.

    Raises:
        InputError: see `open_all`.
    """
    return open_all(files, lambda file: _open(file, columns, vocabulary))


def open_all(files: list[InputFile], open_one: Callable[[InputFile], Fragment]) -> dict[str, Fragment | InputError]:
    """Open all files of the input before any is scored.

    Returns:
        By the file's name the fragment, or why there is none: not readable parquet, a column that is missing or of another
        type.

    Raises:
        InputError: there are no rows, or no file can be used; then it is the first one's error.
    """
    opened: dict[str, Fragment | InputError] = {}
    for file in files:
        try:
            opened[file.name] = open_one(file)
        except InputError as error:
            opened[file.name] = error
    failures = [each for each in opened.values() if isinstance(each, InputError)]
    if len(failures) == len(files):
        raise failures[0]
    if not failures and not any(each.num_rows for each in opened.values() if isinstance(each, Fragment)):
        raise InputError(f"input holds no rows: {len(files)} file(s), all empty (first {str(files[0].path)!r})")
    return opened


def _open(input_file: InputFile, columns: Columns, vocabulary: Vocabulary) -> Fragment:
    hint = "Name the right ones with user_column, history_column, candidates_column and deny_column"
    fragment, schema = open_file(input_file, columns, hint, "The model reads a list of this side feature beside each history")
    path = input_file.path
    for column in columns.lists:
        if not _holds_ids(schema.field(column).type, vocabulary):
            raise InputError(
                f"column {column!r} of {str(path)!r} has type {schema.field(column).type}; the vocabulary holds "
                f"{vocabulary.id_type} item ids, so write it as list<{vocabulary.id_type}>"
            )
    for column in columns.side:
        kind = schema.field(column).type
        if not (is_list(kind) and is_categorical(kind.value_type)):
            raise InputError(f"column {column!r} of {str(path)!r} has type {kind}; it must hold lists: {CATEGORICAL}")
    return fragment


def open_file(input_file: InputFile, columns: Columns, hint: str, side_hint: str) -> tuple[Fragment, pa.Schema]:
    """Open one file, whatever its columns hold but the users' ids.

    Args:
        input_file: which.
        columns: what it must have.
        hint: for the message where another of these is missing ...
        side_hint: ... and where one of ``columns.side`` is.

    Raises:
        InputError: not readable parquet, a column that is missing or there twice, or no ids of users.
    """
    path = input_file.path
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except _UNREADABLE as error:
        raise InputError(f"{str(path)!r} is not readable parquet: {error}; the input is parquet files only") from error
    for column in (columns.user, *columns.lists, *columns.side):
        if column not in schema.names:
            raise InputError(
                f"{str(path)!r} has no column {column!r}; it has {', '.join(map(repr, schema.names))}. "
                + (side_hint if column in columns.side else hint)
            )
        if schema.names.count(column) > 1:
            raise InputError(f"{str(path)!r} has {schema.names.count(column)} columns called {column!r}; rename all but one")
    user_type = _plain(schema.field(columns.user).type)
    if not pa.types.is_integer(user_type) and str(user_type) not in _STRINGS:
        raise InputError(f"column {columns.user!r} of {str(path)!r} has type {user_type}; it must hold integers or strings")
    return Fragment(input_file, columns, num_rows, user_type), schema


def _holds_ids(kind: pa.DataType, vocabulary: Vocabulary) -> bool:
    """Say whether a column is made of lists of the vocabulary's ids."""
    if not is_list(kind):
        return False
    item = _plain(kind.value_type)
    if pa.types.is_null(item):  # all lists of the file are empty, or hold nulls alone
        return True
    return pa.types.is_integer(item) if vocabulary.id_type == "int64" else str(item) in _STRINGS


def is_list(kind: pa.DataType) -> bool:
    """Say whether a column is made of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Give the type of what `glintru_rec.scoring.rows.plain` makes of a column."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if str(kind) == "string_view" else kind
