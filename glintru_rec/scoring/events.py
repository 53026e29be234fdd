"""The input of an update: an event log, cleaned as `prepare` cleans one, by user and time.

Shapes: T events of a batch, B users.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from glintru_rec.data.cleaning import clean, stage
from glintru_rec.data.engine import DuckDBEngine, fetch_one
from glintru_rec.data.formats import Format, LogColumns, LogFile, open_log
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError


@dataclass(frozen=True)
class EventBatch:
    """All events of some users.

    Attributes:
        users: their ids, ascending, ``[B]``.
        rows: the user of each event, ascending, int64 ``[T]``. A user's events are in time order; where times are equal,
            in the log's.
        items: original ids, ``[T]``.
        times: int64 ``[T]``.
        positions: the row of each event in the log, int64 ``[T]``.
        side: values of each side feature, strings ``[T]``.
    """

    users: pa.Array
    rows: np.ndarray
    items: pa.Array
    times: np.ndarray
    positions: np.ndarray
    side: list[pa.Array]


def open_events(location: str, names: LogColumns) -> list[LogFile]:
    """Find the files of an event log.

    Raises:
        InputError: no file matches, or one is not parquet or lacks a column.
    """
    files = open_log(location, names)
    if files[0].format is not Format.PARQUET:
        raise InputError(f"{str(files[0].path)!r} is {files[0].format}; the events of an update are parquet files only")
    return files


class Events:
    """The events of a log, in a database; every row ends as an event of a batch or is set aside.

    Args:
        db: empty; sorts out of core.
        files: of the log.
        names: the columns of user, item and time, and of side features.
        vocabulary: whose type of ids the items must have.

    Attributes:
        num_rows: rows of the log.
        num_users: users who have events that are not set aside.
        user_type: ``int64`` or ``string``.
        time_unit: ``as_given`` or ``microseconds`` (see `prepare`).

    Raises:
        InputError: the log has no rows, or a file or a column cannot be used.
    """

    def __init__(self, db: duckdb.DuckDBPyConnection, files: list[LogFile], names: LogColumns, vocabulary: Vocabulary):
        self._db = db
        engine = DuckDBEngine(db)
        cleaned = clean(engine, files, names, stage(engine, files, names))
        self.num_rows = fetch_one(engine, "SELECT count(*) FROM log")
        self.user_type = cleaned.user_type
        self.time_unit = cleaned.time_unit
        if not self.num_rows:
            raise InputError(
                f"{str(files[0].path)!r} holds no rows ({len(files)} file(s), all empty); there is nothing to update"
            )
        if cleaned.item_type != vocabulary.id_type:
            raise InputError(
                f"column {names.item!r} of {str(files[0].path)!r} holds {cleaned.item_type} ids, the artifact's vocabulary "
                f"{vocabulary.id_type}; write them as {vocabulary.id_type}"
            )
        db.execute("""
            CREATE TABLE acting AS SELECT user_id, row_number() OVER (ORDER BY user_id) - 1 AS user_rank
            FROM (SELECT DISTINCT user_id FROM event WHERE reason IS NULL)""")
        # Sorted once, out of core; each batch then reads only its own stretch of the table.
        self._side = [f"side_{place}" for place in range(len(names.side))]
        values, log = "".join(f", {column}" for column in self._side), "JOIN log USING (position)" if self._side else ""
        db.execute(f"""
            CREATE TABLE sorted AS SELECT user_rank, user_id, item_id, time, position{values}
            FROM event JOIN acting USING (user_id) {log} WHERE reason IS NULL ORDER BY user_rank, time, position""")
        db.execute("CREATE TABLE set_aside AS SELECT position, reason FROM event WHERE reason IS NOT NULL")
        self.num_users = fetch_one(engine, "SELECT count(*) FROM acting")

    def batches(self, batch_size: int) -> Iterator[EventBatch]:
        """Give the events of ``batch_size`` users at a time."""
        for start in range(0, self.num_users, batch_size):
            table = self._db.sql(f"""
                SELECT * FROM sorted WHERE user_rank >= {start} AND user_rank < {start + batch_size}
                ORDER BY user_rank, time, position""").to_arrow_table()
            ranks, rows = np.unique(table["user_rank"].to_numpy(), return_inverse=True)
            first = np.searchsorted(rows, np.arange(len(ranks)))
            yield EventBatch(
                users=table["user_id"].combine_chunks().take(pa.array(first)),
                rows=rows,
                items=table["item_id"].combine_chunks(),
                times=table["time"].to_numpy(),
                positions=table["position"].to_numpy(),
                side=[table[column].combine_chunks() for column in self._side],
            )

    def set_aside(self, positions: np.ndarray, reason: str) -> None:
        """Set events of a batch aside."""
        if len(positions):
            self._db.register("found", pa.table({"position": positions}))
            self._db.execute("INSERT INTO set_aside SELECT position, $reason FROM found", {"reason": reason})
            self._db.unregister("found")

    def counts_set_aside(self) -> Counter[str]:
        """Count the rows that were set aside, by reason."""
        return Counter(dict(self._db.execute("SELECT reason, count(*) FROM set_aside GROUP BY reason").fetchall()))

    def rows_set_aside(self) -> Iterator[pa.Table]:
        """Give the rows that were set aside as they were written, with reason, fragment and row, in the log's order."""
        found = self._db.sql("""
            SELECT CAST(user_raw AS VARCHAR) AS user_id, CAST(item_raw AS VARCHAR) AS item_id,
                CAST(time_raw AS VARCHAR) AS "timestamp", reason, path AS fragment, position - first + 1 AS row
            FROM set_aside JOIN log USING (position) JOIN file ON position >= first AND position < first + num_rows
            ORDER BY position""")
        for batch in found.to_arrow_reader(1 << 16):
            yield pa.Table.from_batches([batch])
