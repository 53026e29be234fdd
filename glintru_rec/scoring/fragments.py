"""The input of a scoring job: parquet files, all opened before the first is read."""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.formats import find_files
from glintru_rec.data.side_features import CATEGORICAL, NO_SIDE, SideVocabulary, is_categorical
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.scoring.addresses import RemoteFile, errors_of_systems, find_remote, is_remote
from glintru_rec.scoring.rows import Columns, Limits, Rows, decode

_STRINGS = ("string", "large_string", "string_view")
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of damaged names of columns
# Read column chunks piece by piece; by default pyarrow takes a row group's whole column into memory.
_READ_BYTES = 1 << 20
# Rows are read a few at a time, and joined to batches of at most so many list items: lists may be long, and short ones follow.
_PIECE_ROWS = 32
_BATCH_ITEMS = 1 << 21
_NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"


class Stamp(NamedTuple):
    """What tells that a file is still the one that it was, without reading it."""

    num_bytes: int
    mtime_ns: int
    """Of a file elsewhere, a number that tells its versions apart."""

    @classmethod
    def of(cls, path: Path | RemoteFile) -> "Stamp":
        """Look at a file."""
        if isinstance(path, RemoteFile):
            return cls(*path.look())
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class InputFile:
    """One file of the input, not yet opened.

    Attributes:
        path: where it is.
        name: of the output file; it ends in ``.parquet`` and is unique in the input.
        stamp: before anything was read of it.
        folders: what the folders that it lies in, ``name=value``, say of all its rows.
    """

    path: Path | RemoteFile
    name: str
    stamp: Stamp
    folders: dict[str, pa.Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Fragment:
    """One parquet file of the input, found usable.

    Attributes:
        file: which.
        columns: what is read of it.
        num_rows: as its footer says.
        user_type: type of the user ids.
        kept: the columns to keep, with their types.
        from_folders: the columns that the file lacks, but its folders have.
    """

    file: InputFile
    columns: Columns
    num_rows: int
    user_type: pa.DataType
    kept: pa.Schema
    from_folders: Sequence[str]

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
            with _parquet(path, buffer_size=_READ_BYTES, page_checksum_verification=True) as file:
                piece = math.ceil(batch_size / math.ceil(batch_size / _PIECE_ROWS))
                for batch in self._joined(self._pieces(file, piece), batch_size):
                    yield self._with_folders(batch)
            stamp = Stamp.of(path)
        except _UNREADABLE as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}; write or copy it again") from error
        if stamp != self.file.stamp:
            raise InputError(f"{str(path)!r} was changed while it was read; run the job again when it is complete")

    def _pieces(self, file: pq.ParquetFile, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Read ``num_rows`` rows at a time, and fewer at the end of a row group."""
        columns = [name for name in self.columns.names if name not in self.from_folders]
        # Each row group has dictionaries of its own, and pyarrow cannot read a list of two of them into one batch.
        for group in range(file.num_row_groups):
            # pyarrow's own threads would share a piece of some microseconds: ten thousand switches a second, for nothing.
            yield from file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False)

    def _with_folders(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        constants = [pa.repeat(self.file.folders[name], len(batch)) for name in self.from_folders]
        return pa.RecordBatch.from_arrays([*batch.columns, *constants], [*batch.schema.names, *self.from_folders])

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


@contextmanager
def _parquet(path: Path | RemoteFile, **options: Any) -> Iterator[pq.ParquetFile]:
    if isinstance(path, Path):
        with pq.ParquetFile(path, **options) as file:
            yield file
        return
    with errors_of_systems(), path.open() as source, pq.ParquetFile(source, **options) as file:
        yield file


def find_inputs(location: str) -> list[InputFile]:
    """Find the files of the input.

    Args:
        location: a parquet file, a folder of them (searched to the bottom; names that start with ``.`` or ``_`` are
            skipped) or a glob pattern; local, or at any address of fsspec.

    Raises:
        InputError: no file, one that is gone again, or two that would be written under one name.
    """
    paths: Sequence[Path | RemoteFile] = find_remote(location) if is_remote(location) else find_files(location)
    places = [PurePosixPath(path.place) if isinstance(path, RemoteFile) else path for path in paths]
    common = os.path.commonpath([place.parent for place in places])
    files: dict[str, InputFile] = {}
    for path, place, folders in zip(paths, places, _folder_values(places)):
        # The output is flat, so that one pattern, *.parquet, finds all of it: a sub-folder becomes part of the name.
        name = "__".join(place.relative_to(common).parts).removesuffix(".parquet") + ".parquet"
        if name in files:
            raise InputError(f"{str(files[name].path)!r} and {str(path)!r} would both be written as {name!r}; rename one")
        try:
            files[name] = InputFile(path, name, Stamp.of(path), folders)
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}; write or copy it again") from error
    return list(files.values())


def _folder_values(places: Sequence[PurePath]) -> list[dict[str, pa.Scalar]]:
    """Read the values in folders' names, ``name=value`` as Hive writes them: int64 where all of a name are integers."""
    texts = [dict(part.split("=", 1) for part in place.parts[:-1] if "=" in part) for place in places]
    values = [{name: None if text == _NULL_FOLDER else unquote(text) for name, text in each.items()} for each in texts]
    all_of: dict[str, list[str]] = {}
    for each in values:
        for name, value in each.items():
            all_of.setdefault(name, []).extend([] if value is None else [value])
    are_integers = {name: all(re.fullmatch(r"-?\d{1,18}", value) for value in several) for name, several in all_of.items()}

    def scalar(name: str, value: str | None) -> pa.Scalar:
        if are_integers[name]:
            return pa.scalar(None if value is None else int(value), pa.int64())
        return pa.scalar(value, pa.string())

    return [{name: scalar(name, value) for name, value in each.items()} for each in values]


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
    hint = "Name the right ones with user_column, history_column, candidates_column, deny_column and keep_columns"
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
        with _parquet(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except _UNREADABLE as error:
        raise InputError(f"{str(path)!r} is not readable parquet: {error}; the input is parquet files only") from error
    from_folders = [name for name in columns.names if name in input_file.folders and name not in schema.names]
    for name in from_folders:
        schema = schema.append(pa.field(name, input_file.folders[name].type))
    for column in columns.names:
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
    kept = pa.schema([(name, _plain(schema.field(name).type)) for name in columns.kept])
    return Fragment(input_file, columns, num_rows, user_type, kept, from_folders), schema


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
