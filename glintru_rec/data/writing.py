"""Write the files of a dataset from the tables that cleaning left (see `glintru_rec.data.cleaning`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.cleaning import Cleaned
from glintru_rec.data.dataset import MIN_EVENTS_TO_SPLIT, SET_ASIDE_FILE, SIDE_TYPE, VOCABULARY_FILE, side_column
from glintru_rec.data.side_features import MAX_VALUES, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

EVENTS_PER_PART = 1 << 20
_USERS_PER_ROW_GROUP = 1 << 14
_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


def fetch_one(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """Give the single value of a query."""
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


def write_vocabulary(db: duckdb.DuckDBPyConnection, folder: Path, cleaned: Cleaned) -> Vocabulary:
    """Number the items by count, most frequent first, then by first appearance in the log; write the vocabulary."""
    db.execute("""
        CREATE TABLE item AS SELECT item_key, count(*) AS num_events,
            row_number() OVER (ORDER BY count(*) DESC, item_key) - 1 AS item_index
        FROM kept GROUP BY item_key""")
    table = db.sql("SELECT item_id, num_events FROM item JOIN item_name USING (item_key) ORDER BY item_index").to_arrow_table()
    item_ids = table["item_id"].cast(cleaned.item_type).combine_chunks()
    vocabulary = Vocabulary(item_ids, table["num_events"].to_numpy())
    (folder / VOCABULARY_FILE).parent.mkdir()
    vocabulary.save(folder / VOCABULARY_FILE)
    return vocabulary


def write_side_vocabulary(db: duckdb.DuckDBPyConnection, folder: Path, names: Sequence[str]) -> SideVocabulary:
    """Number the values of side features by count, most frequent first, then by value; write them.

    Raises:
        InputError: a feature has too many.
    """
    values: dict[str, list[str]] = {}
    for place, name in enumerate(names):
        column = f"side_{place}"
        found = db.execute(f"""
            SELECT {column} FROM kept JOIN log USING (position) WHERE {column} <> ''
            GROUP BY {column} ORDER BY count(*) DESC, {column} LIMIT {MAX_VALUES + 1}""").fetchall()
        if len(found) > MAX_VALUES:
            raise InputError(
                f"side column {name!r} has more than {MAX_VALUES:,} values; side features are small: group its values, or "
                f"leave it out"
            )
        values[name] = [value for (value,) in found]
    vocabulary = SideVocabulary(values)
    vocabulary.save(folder)
    return vocabulary


def write_sequences(
    db: duckdb.DuckDBPyConnection, folder: Path, cleaned: Cleaned, side: SideVocabulary
) -> list[dict[str, Any]]:
    """Write users in the order of their first appearance in the log, a new part after every ``EVENTS_PER_PART`` events."""
    db.execute(f"""
        CREATE TABLE user_part AS
        SELECT user_key, count(*) AS num_events,
            CAST((sum(count(*)) OVER (ORDER BY user_key) - count(*)) // {EVENTS_PER_PART} AS BIGINT) AS part
        FROM kept GROUP BY user_key""")
    # Sorted once, out of core; each part below then reads only its own stretch of the table.
    side_values = "".join(f", side_{place}" for place in range(len(side.names)))
    log = "JOIN log USING (position)" if side_values else ""
    db.execute(f"""
        CREATE TABLE sequence AS SELECT part, user_key, time, position, item_index{side_values}
        FROM kept JOIN user_part USING (user_key) JOIN item USING (item_key) {log} ORDER BY user_key, time, position""")
    schema = pa.schema(
        [("user_id", cleaned.user_type), ("items", pa.list_(pa.int64())), ("timestamps", pa.list_(pa.int64()))]
        + [(side_column(name), pa.list_(SIDE_TYPE)) for name in side.names]
    )
    parts: list[dict[str, Any]] = []
    (folder / "sequences").mkdir()
    for (part,) in db.execute("SELECT DISTINCT part FROM user_part ORDER BY part").fetchall():
        users = db.sql(f"""
            SELECT user_id, num_events FROM user_part JOIN user_name USING (user_key)
            WHERE part = {part} ORDER BY user_key""").to_arrow_table()
        events = db.sql(f"""
            SELECT item_index, time{side_values} FROM sequence WHERE part = {part}
            ORDER BY user_key, time, position""").to_arrow_table()
        offsets = pa.array(np.concatenate([[0], np.cumsum(users["num_events"].to_numpy())]), pa.int32())
        columns = [events[name].combine_chunks() for name in ("item_index", "time")]
        for place, name in enumerate(side.names):
            columns.append(pa.array(side.encode(name, events[f"side_{place}"].combine_chunks()), SIDE_TYPE))
        lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
        table = pa.table([users["user_id"].cast(cleaned.user_type), *lists], schema=schema)
        file = f"sequences/part-{len(parts):05d}.parquet"
        pq.write_table(table, folder / file, compression="zstd", row_group_size=_USERS_PER_ROW_GROUP)
        parts.append({"file": file, "num_users": len(table), "num_events": len(events)})
    return parts


def write_set_aside(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Write every row that cleaning set aside, as it was; rows lost to the minimum counts are only counted."""
    db.sql("""
        SELECT path AS file, position - first + 1 AS row, reason, CAST(user_raw AS VARCHAR) AS user,
            CAST(item_raw AS VARCHAR) AS item, CAST(time_raw AS VARCHAR) AS timestamp
        FROM event JOIN log USING (position) JOIN file ON position >= first AND position < first + num_rows
        WHERE reason IS NOT NULL ORDER BY position""").write_parquet(str(folder / SET_ASIDE_FILE), compression="zstd")


def statistics(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Count what is worth knowing about the events that were kept."""
    late = """
        SELECT count(*) FROM (SELECT time, max(time) OVER (
            PARTITION BY user_key ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS latest FROM kept)
        WHERE time < latest"""
    quantiles = ", ".join(f"quantile_disc(num_events, {q})" for q in _QUANTILES.values())
    lengths = db.execute(f"SELECT {quantiles} FROM user_part").fetchone()
    assert lengths is not None
    return {
        "out_of_order_rows": fetch_one(db, late),
        "users_too_short_to_split": fetch_one(db, f"SELECT count(*) FROM user_part WHERE num_events < {MIN_EVENTS_TO_SPLIT}"),
        "length_quantiles": dict(zip(_QUANTILES, lengths)),
    }
