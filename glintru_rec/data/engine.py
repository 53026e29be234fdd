"""What runs the queries of `prepare`: DuckDB in this process, or Spark (`glintru_rec.data.spark`).

The queries are one text for both: what the two write alike, and these two functions, which each engine brings along:

- ``matches(text, pattern)``: whether all of the text matches a regular expression,
- ``micros(text)``: an ISO date or time as microseconds since 1970, in UTC where it names no zone; NULL if it is none.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa

from glintru_rec.data.formats import LogColumns, LogFile
from glintru_rec.errors import InputError
from glintru_rec.progress import Progress


@dataclass(frozen=True)
class RawColumn:
    """How one column of the log is staged.

    Attributes:
        kind: ``integer``, ``float``, ``timestamp`` or ``text``.
        sql_type: the SQL type that holds all its values exactly.
    """

    kind: str
    sql_type: str


Columns = tuple[RawColumn, RawColumn, RawColumn]
"""User, item and time."""


class Engine(Protocol):
    """Runs queries over tables that need not fit in memory. A query's rows have an order only if it says ``ORDER BY``."""

    def stage(self, files: Sequence[LogFile], names: LogColumns, columns: Columns, first: int) -> None:
        """Read a log, in its order, into the tables ``log`` and ``file``.

        ``log`` has position, user_raw, item_raw, time_raw, and ``side_0`` … as text; ``file`` has path, first (position) and
        num_rows.

        Args:
            files: of the log.
            names: its columns.
            columns: how they are staged; timestamps become microseconds since 1970, UTC, as int64.
            first: position of the first row.

        Raises:
            InputError: a file cannot be read.
        """

    def create(self, table: str, query: str) -> None:
        """Keep the rows of a query as a table, in their order."""

    def remove(self, table: str, key: str, query: str) -> int:
        """Remove the rows of a table whose ``key`` is among those that a query gives under that name; count them."""

    def drop(self, table: str) -> None:
        """Give up a table that `create` or `stage` made."""

    def open_parquet(self, table: str, files: Sequence[Path], lists: Sequence[str] = ()) -> None:
        """Make the rows of parquet files of one schema a table.

        Args:
            table: its name.
            files: at least one.
            lists: columns of lists, equally long within a row. Each place of them becomes a row, beside the other columns.
        """

    def rows(self, query: str) -> list[tuple]:
        """Give the rows of a query; few."""

    def arrow(self, query: str) -> pa.Table:
        """Give the rows of a query; they must fit in memory."""


def fetch_one(engine: Engine, query: str) -> int:
    """Give the single value of a query."""
    return engine.rows(query)[0][0]


class DuckDBEngine:
    """DuckDB in this process: out of core, on one machine. See `Engine` for the methods.

    Args:
        db: an open database; see `scratch_database`.
    """

    def __init__(self, db: duckdb.DuckDBPyConnection):
        self._db = db
        db.execute("CREATE TEMP MACRO matches(text, pattern) AS regexp_full_match(text, pattern)")
        db.execute("CREATE TEMP MACRO micros(text) AS epoch_us(TRY_CAST(text AS TIMESTAMPTZ))")

    def stage(self, files: Sequence[LogFile], names: LogColumns, columns: Columns, first: int) -> None:  # noqa: D102
        user, item, time = (column.sql_type for column in columns)
        self._db.execute("CREATE TABLE file (path STRING, first BIGINT, num_rows BIGINT)")
        side = [f"side_{place}" for place in range(len(names.side))]
        more = "".join(f", {column} STRING" for column in side)
        self._db.execute(f"CREATE TABLE log (position BIGINT, user_raw {user}, item_raw {item}, time_raw {time}{more})")
        # A zoned or nanosecond timestamp becomes microseconds since 1970 in UTC.
        time_raw = "epoch_us(time_raw)" if columns[2].kind == "timestamp" else "time_raw"
        progress = Progress("reading", len(files), "files")
        for number, file in enumerate(files):
            progress.update(number)
            query, parameters = file.query(names)
            values = ", ".join([f"{first} + row - 1, user_raw, item_raw, {time_raw}", *side])
            insert = f"INSERT INTO log SELECT {values} FROM ({query})"
            num_rows = read_log(self._db, file, insert, parameters)[0][0]
            self._db.execute("INSERT INTO file VALUES (?, ?, ?)", [str(file.path), first, num_rows])
            first += num_rows

    def create(self, table: str, query: str) -> None:  # noqa: D102
        self._db.execute(f"CREATE TABLE {table} AS {query}")

    def remove(self, table: str, key: str, query: str) -> int:  # noqa: D102
        return self.rows(f"DELETE FROM {table} WHERE {key} IN ({query})")[0][0]

    def drop(self, table: str) -> None:  # noqa: D102
        self._db.execute(f"DROP TABLE {table}")

    def open_parquet(self, table: str, files: Sequence[Path], lists: Sequence[str] = ()) -> None:  # noqa: D102
        paths = ", ".join("'" + glob.escape(str(file)).replace("'", "''") + "'" for file in files)
        replaced = f" REPLACE ({', '.join(f'unnest({name}) AS {name}' for name in lists)})" if lists else ""
        self._db.execute(f"CREATE VIEW {table} AS SELECT *{replaced} FROM read_parquet([{paths}], hive_partitioning = false)")

    def rows(self, query: str) -> list[tuple]:  # noqa: D102
        return self._db.execute(query).fetchall()

    def arrow(self, query: str) -> pa.Table:  # noqa: D102
        return self._db.sql(query).to_arrow_table()


def read_log(db: duckdb.DuckDBPyConnection, file: LogFile, query: str, parameters: dict[str, object]) -> list[tuple]:
    """Run a query that reads a file of a log.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return db.execute(query, parameters).fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        # What follows the cause are hints about options of DuckDB that our user does not have.
        cause = re.split(r"\n\s*\n|\nPossible", str(error))[0].replace("\n", "; ")
        what = f"{str(file.path)!r} ({file.format}) cannot be read: {cause}"
        raise InputError(f"{what}; correct it or write the file again") from error
