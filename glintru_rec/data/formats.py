"""Interaction logs: find their files and recognise each one by its content, never by its name.

=====================  ==============================================================================
parquet                starts with ``PAR1``
RecBole ``.inter``     tab-separated; every header field is ``name:type``
MovieLens ``.dat``     no header; ``user::item::rating::time``
MovieLens ``u.data``   no header; four tab-separated integers: user, item, rating, time
csv                    any other text: a header and one of ``, tab ; |``
=====================  ==============================================================================
"""

import csv
import enum
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.errors import InputError

_HEAD_BYTES = 1 << 16
_DELIMITERS = (",", "\t", ";", "|")
_RECBOLE_FIELD = re.compile(r"(.+):(?:token|float|token_seq|float_seq)")
_DAT_LINE = re.compile(r"[^:]+::[^:]+::[^:]+::-?\d+")
_DATA_LINE = re.compile(r"-?\d+(?:\t-?\d+){3}")


class Format(enum.StrEnum):
    """The formats of logs; the value is the name for people."""

    PARQUET = "parquet"
    CSV = "csv"
    RECBOLE = "RecBole .inter"
    MOVIELENS_DAT = "MovieLens ratings.dat"
    MOVIELENS_DATA = "MovieLens u.data"


@dataclass(frozen=True)
class LogColumns:
    """The names of the three columns that an event needs. Logs without a header have them at known places.

    Attributes:
        side: further columns that tell of each event, as text.
    """

    user: str
    item: str
    time: str
    side: tuple[str, ...] = ()

    def __iter__(self):
        return iter((self.user, self.item, self.time, *self.side))


@dataclass(frozen=True)
class LogFile:
    """One file of a log, recognised.

    Attributes:
        path: where it is.
        format: how it is written.
        columns: the names of all its columns, in the file's order.
        delimiter: what separates the fields of a text file; empty for parquet.
    """

    path: Path
    format: Format
    columns: tuple[str, ...]
    delimiter: str = ""

    def query(self, names: LogColumns) -> tuple[str, dict[str, object]]:
        """Give the DuckDB query that reads the file, with its parameters.

        Returns:
            A query with columns ``row`` (from 1, the header not counted), ``user_raw``, ``item_raw``, ``time_raw`` and
            ``side_0`` … for the side columns. Text formats give text; parquet gives its own types.
        """
        # DuckDB takes every path for a pattern.
        parameters: dict[str, object] = {"path": glob.escape(str(self.path))}
        if self.format is Format.PARQUET:
            user, item, time, *side = (_quoted(name) for name in names)
            row = "file_row_number + 1"
            source = "read_parquet($path, file_row_number = true, hive_partitioning = false)"
        else:
            user, item, time, *side = (f"c{self.columns.index(name)}" for name in names)
            # A streaming window reads its input in the file's order, whatever the number of threads.
            row = "row_number() OVER ()"
            columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(len(self.columns)))
            has_header = self.format in (Format.CSV, Format.RECBOLE)
            source = (
                f"read_csv($path, auto_detect = false, header = {has_header}, delim = $delimiter, quote = $quote, "
                f"escape = $quote, nullstr = '', allow_quoted_nulls = false, compression = 'none', columns = {{{columns}}})"
            )
            # The other text formats know no quotes: a '"' in an id is a letter of it.
            parameters |= {"delimiter": self.delimiter, "quote": '"' if self.format is Format.CSV else ""}
        more = "".join(f", {column} AS side_{place}" for place, column in enumerate(side))
        return (
            f"SELECT {row} AS row, {user} AS user_raw, {item} AS item_raw, {time} AS time_raw{more} FROM {source}",
            parameters,
        )


def open_log(location: str, names: LogColumns) -> list[LogFile]:
    """Find and recognise the files of a log.

    The order of the result is the log's: files by name, rows as they stand in their file.

    Args:
        location: a file, a folder (searched to the bottom; names that start with ``.`` or ``_`` are skipped, as Hadoop
            and Spark do) or a glob pattern.
        names: the columns that every file must have.

    Raises:
        InputError: no file matches, a file cannot be recognised or lacks a column, or the formats are mixed.
    """
    files = [recognise(path, names) for path in find_files(location)]
    for file in files[1:]:
        if file.format is not files[0].format:
            raise InputError(
                f"input {location!r} mixes formats: {str(files[0].path)!r} is {files[0].format}, {str(file.path)!r} is "
                f"{file.format}; give one format at a time, with a glob such as '{location}/*.parquet'"
            )
    return files


def find_files(location: str) -> list[Path]:
    """Give the files that ``location`` (a file, folder or glob) names, sorted by name."""
    path = Path(location)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        files = [file for file in inside if not any(part[0] in "._" for part in file.relative_to(path).parts)]
    else:
        files = [Path(match) for match in glob.glob(location, recursive=True) if os.path.isfile(match)]
    if not files:
        raise InputError(f"input {location!r} matches no file; give a file, a folder that holds files, or a glob pattern")
    return sorted(files, key=str)


def recognise(path: Path, names: LogColumns) -> LogFile:
    """Recognise one file by its content.

    Raises:
        InputError: the file is empty, unreadable or of no known format, or lacks one of the columns.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if not head:
        raise InputError(f"{str(path)!r} is empty (0 bytes); remove it from the input or write it again")
    log = _recognise_parquet(path) if head.startswith(b"PAR1") else _recognise_text(path, _first_line(path, head), names)
    for name in names:
        same = [column for column in log.columns if column.lower() == name.lower()]
        if name not in log.columns:
            raise InputError(
                f"{str(path)!r} ({log.format}) has no column {name!r}; it has {', '.join(map(repr, log.columns))}. "
                f"Name the right ones with user_column, item_column, time_column and side_columns"
            )
        if len(same) > 1:  # SQL names know no case, so either could be read for the other
            several = ", ".join(map(repr, same))
            raise InputError(f"{str(path)!r} has several columns called {name!r} ({several}); rename all but one")
    return log


def _recognise_parquet(path: Path) -> LogFile:
    try:
        return LogFile(path, Format.PARQUET, tuple(pq.read_schema(path).names))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{str(path)!r} starts like parquet but cannot be read: {error}; write or copy it again") from error


def _recognise_text(path: Path, line: str, names: LogColumns) -> LogFile:
    fields = line.split("\t")
    recbole = [_RECBOLE_FIELD.fullmatch(field) for field in fields]
    headerless = (names.user, names.item, "rating", names.time)
    if all(recbole):
        return LogFile(path, Format.RECBOLE, tuple(match[1] for match in recbole if match), "\t")
    if _DAT_LINE.fullmatch(line):
        return LogFile(path, Format.MOVIELENS_DAT, headerless, "::")
    if _DATA_LINE.fullmatch(line):
        return LogFile(path, Format.MOVIELENS_DATA, headerless, "\t")
    return _recognise_csv(path, line, names)


def _recognise_csv(path: Path, line: str, names: LogColumns) -> LogFile:
    headers = {delimiter: tuple(next(csv.reader([line], delimiter=delimiter))) for delimiter in _DELIMITERS}
    # The right delimiter shows the columns that we look for; if none does, the message shows the finest cut.
    delimiter = max(headers, key=lambda d: (len(set(names) & set(headers[d])), len(headers[d])))
    columns = headers[delimiter]
    if not set(names) & set(columns) and any(re.fullmatch(r"-?\d+(\.\d+)?", field) for field in columns):
        raise InputError(
            f"the first line of {str(path)!r} is {line[:80]!r}, which is not a header; "
            f"write a first line that names the columns, such as '{delimiter.join(names)}'"
        )
    return LogFile(path, Format.CSV, columns, delimiter)


def _first_line(path: Path, head: bytes) -> str:
    line = re.split(rb"\r\n|\n|\r", head, maxsplit=1)[0]
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        raise InputError(
            f"{str(path)!r} is of no known format: it starts with {head[:16]!r}. "
            f"Logs are parquet, csv (UTF-8, not compressed), RecBole .inter or MovieLens ratings.dat / u.data"
        )
    return text


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
