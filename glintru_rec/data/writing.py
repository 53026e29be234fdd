"""Write the files of a dataset from the tables that cleaning left (see `glintru_rec.data.cleaning`).

The bytes follow from the rows alone: what is in a row group is decided here, by the log's positions and the number of events,
never by how an engine hands its rows over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.cleaning import Cleaned
from glintru_rec.data.dataset import MIN_EVENTS_TO_SPLIT
from glintru_rec.data.dataset_files import RARE_FILE, SET_ASIDE_FILE, SIDE_TYPE, VOCABULARY_FILE, side_column
from glintru_rec.data.engine import Engine, fetch_one
from glintru_rec.data.side_features import MAX_VALUES, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.progress import Progress

EVENTS_PER_PART = 1 << 20
_USERS_PER_ROW_GROUP = 1 << 14
_POSITIONS_PER_ROW_GROUP = 1 << 20
_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SET_ASIDE = {"file": "string", "row": "int64", "reason": "string", "user": "string", "item": "string", "timestamp": "string"}


def write_vocabulary(engine: Engine, folder: Path, cleaned: Cleaned, known_items: str = "") -> Vocabulary:
    """Number the items by count, most frequent first, then by first appearance in the log; write the vocabulary.

    Args:
        engine: with the table ``kept``; gets the table ``item``.
        folder: of the dataset.
        cleaned: the columns' types.
        known_items: query of items (item_id, known_index) that come first, numbered as they are; all of them are in ``kept``.
    """
    known = f"LEFT JOIN ({known_items}) AS known USING (item_id)" if known_items else ""
    order = "known_index NULLS LAST, " if known_items else ""
    engine.create(
        "item",
        f"""
        SELECT item_key, num_events,
            CAST(row_number() OVER (ORDER BY {order}num_events DESC, item_key) - 1 AS BIGINT) AS item_index
        FROM (SELECT item_key, count(*) AS num_events FROM kept GROUP BY item_key) AS counted
        JOIN item_name USING (item_key) {known}""",
    )
    table = engine.arrow("SELECT item_id, num_events FROM item JOIN item_name USING (item_key) ORDER BY item_index")
    item_ids = table["item_id"].cast(cleaned.item_type).combine_chunks()
    vocabulary = Vocabulary(item_ids, table["num_events"].to_numpy())
    (folder / VOCABULARY_FILE).parent.mkdir()
    vocabulary.save(folder / VOCABULARY_FILE)
    return vocabulary


def write_side_vocabulary(engine: Engine, folder: Path, names: Sequence[str]) -> SideVocabulary:
    """Number the values of side features by count, most frequent first, then by value; write them.

    Raises:
        InputError: a feature has too many.
    """
    values: dict[str, list[str]] = {}
    for place, name in enumerate(names):
        column = f"side_{place}"
        found = engine.rows(f"""
            SELECT {column} FROM kept JOIN log USING (position) WHERE {column} <> ''
            GROUP BY {column} ORDER BY count(*) DESC, {column} LIMIT {MAX_VALUES + 1}""")
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
    engine: Engine, folder: Path, cleaned: Cleaned, side: SideVocabulary, raw: bool = False
) -> list[dict[str, Any]]:
    """Write users in the order of their first appearance in the log, a new part after every ``EVENTS_PER_PART`` events.

    Args:
        engine: with the table ``kept``, and ``item`` unless ids are ``raw``.
        folder: of the dataset.
        cleaned: the columns' types.
        side: values of the side columns.
        raw: items are written with their ids, not their indices.

    Returns:
        The parts, for the manifest.
    """
    engine.create(
        "user_part",
        f"""
        SELECT user_key, count(*) AS num_events,
            CAST(floor((sum(count(*)) OVER (ORDER BY user_key) - count(*)) / {EVENTS_PER_PART}) AS BIGINT) AS part
        FROM kept GROUP BY user_key""",
    )
    # Sorted once, out of core; each part below then reads only its own stretch of the table.
    side_values = "".join(f", side_{place}" for place in range(len(side.names)))
    log = "JOIN log USING (position)" if side_values else ""
    item, items = ("item_id", "") if raw else ("item_index", "JOIN item USING (item_key)")
    engine.create(
        "sequence",
        f"""
        SELECT part, user_key, time, position, {item}{side_values}
        FROM kept JOIN user_part USING (user_key) {items} {log} ORDER BY user_key, time, position""",
    )
    item_type = pa.type_for_alias(cleaned.item_type if raw else "int64")
    lists = [("items", pa.list_(item_type)), *((name, pa.list_(pa.int64())) for name in ("timestamps", "positions"))]
    side_lists = [(side_column(name), pa.list_(SIDE_TYPE)) for name in side.names]
    schema = pa.schema([("user_id", cleaned.user_type), *lists, *side_lists])
    repeated = ["user_id", *(f"{name}.list.element" for name in schema.names if name not in ("user_id", "positions"))]
    parts: list[dict[str, Any]] = []
    (folder / "sequences").mkdir()
    numbers = engine.rows("SELECT DISTINCT part FROM user_part ORDER BY part")
    progress = Progress("writing", len(numbers), "parts")
    for (part,) in numbers:
        progress.update(len(parts))
        users = engine.arrow(f"""
            SELECT user_id, num_events FROM user_part JOIN user_name USING (user_key)
            WHERE part = {part} ORDER BY user_key""")
        events = engine.arrow(f"""
            SELECT {item}, time, position{side_values} FROM sequence WHERE part = {part}
            ORDER BY user_key, time, position""")
        offsets = pa.array(np.concatenate([[0], np.cumsum(users["num_events"].to_numpy())]), pa.int32())
        values = [column.combine_chunks() for column in events.columns]
        values[0] = values[0].cast(item_type)
        for place, name in enumerate(side.names, start=3):
            values[place] = pa.array(side.encode(name, values[place]), SIDE_TYPE)
        columns = [pa.ListArray.from_arrays(offsets, each) for each in values]
        table = pa.table([users["user_id"].cast(cleaned.user_type), *columns], schema=schema).combine_chunks()
        file = f"sequences/part-{len(parts):05d}.parquet"
        pq.write_table(
            table,
            folder / file,
            compression="zstd",
            row_group_size=_USERS_PER_ROW_GROUP,
            use_dictionary=repeated,
            column_encoding={"positions.list.element": "DELTA_BINARY_PACKED"},  # they are all different
        )
        parts.append({"file": file, "num_users": len(table), "num_events": len(events)})
    return parts


def write_set_aside(engine: Engine, folder: Path, earlier: Path | None = None) -> None:
    """Write every row that cleaning set aside, as it was, after those of an ``earlier`` file."""
    engine.create(
        "set_aside",
        """
        SELECT position, path, position - first + 1 AS file_row, reason, user_raw, item_raw, time_raw
        FROM event JOIN log USING (position) JOIN file ON position >= first AND position < first + num_rows
        WHERE reason IS NOT NULL ORDER BY position""",
    )
    with pq.ParquetWriter(folder / SET_ASIDE_FILE, pa.schema(list(_SET_ASIDE.items())), compression="zstd") as writer:
        if earlier is not None:
            file = pq.ParquetFile(earlier)
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group))
        columns = "path, file_row, reason, user_raw, item_raw, time_raw"
        _write_by_position(engine, writer, "set_aside", columns)


def write_rare(engine: Engine, folder: Path, cleaned: Cleaned, raw: bool = False) -> None:
    """Write the clean events that were lost to the minimum counts, in the log's order: later logs may bring them back."""
    # Of a user and an item that are both kept, every event is.
    items = "" if raw else "JOIN item_name USING (item_id) LEFT JOIN item USING (item_key)"
    engine.create(
        "rare",
        f"""
        SELECT position, user_id, item_id, time FROM event JOIN user_name USING (user_id)
        LEFT JOIN user_part USING (user_key) {items}
        WHERE reason IS NULL AND (part IS NULL {"" if raw else "OR item_index IS NULL"}) ORDER BY position""",
    )
    types = {"position": "int64", "user_id": cleaned.user_type, "item_id": cleaned.item_type, "timestamp": "int64"}
    with pq.ParquetWriter(folder / RARE_FILE, pa.schema(list(types.items())), compression="zstd") as writer:
        _write_by_position(engine, writer, "rare", "position, user_id, item_id, time")


def _write_by_position(engine: Engine, writer: pq.ParquetWriter, table: str, columns: str) -> None:
    """Write columns of a table, a row group for each stretch of positions that has any."""
    size = _POSITIONS_PER_ROW_GROUP
    groups = engine.rows(f"SELECT DISTINCT CAST(floor(position / {size}) AS BIGINT) AS stretch FROM {table} ORDER BY stretch")
    for (group,) in groups:
        within = f"position >= {group * size} AND position < {(group + 1) * size}"
        rows = engine.arrow(f"SELECT {columns} FROM {table} WHERE {within} ORDER BY position").combine_chunks()
        casts = [column.cast(field.type) for column, field in zip(rows.columns, writer.schema)]
        writer.write_table(pa.table(casts, schema=writer.schema))


def statistics(engine: Engine) -> dict[str, Any]:
    """Count what is worth knowing about the events that were kept."""
    late = """
        SELECT count(*) FROM (SELECT time, max(time) OVER (
            PARTITION BY user_key ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS latest FROM kept)
        WHERE time < latest"""
    lengths = np.array(engine.rows("SELECT num_events, count(*) FROM user_part GROUP BY num_events ORDER BY num_events"))
    length, num_users = lengths[:, 0], lengths[:, 1].cumsum()
    return {
        "out_of_order_rows": fetch_one(engine, late),
        "users_too_short_to_split": int(lengths[length < MIN_EVENTS_TO_SPLIT, 1].sum()),
        # The least length that a share of the users does not exceed.
        "length_quantiles": {
            name: int(length[np.searchsorted(num_users, share * num_users[-1])]) for name, share in _QUANTILES.items()
        },
    }
