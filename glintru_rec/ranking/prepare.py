"""Prepare a ranking dataset: from events and attributes, by expressions of SQL, to arrays that training can read.

A feature or task is a name and an expression over the columns of an event, its user and its item. DuckDB computes it, so it
may be any of DuckDB's functions, and look at what came before through the windows

===============  ==========================================================================================
``user_past``    the user's events before this one's time (events of the same time do not see each other)
``item_past``    the item's events before this one's time
``user_order``   the user's events up to this one, in order: for ``lag``
===============  ==========================================================================================

such as ``avg(rating) OVER item_past``; ``event_time`` is the event's time as a whole number. Values and scales are learnt
from the training period alone.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import MISSING

from glintru_rec.config import check, one_of
from glintru_rec.data.scratch import scratch_database
from glintru_rec.data.side_features import rows_of
from glintru_rec.errors import InputError
from glintru_rec.files import check_free, folder_aside
from glintru_rec.ranking.dataset import (
    EVENTS_FILE,
    EXAMPLES_FILE,
    ITEM,
    LOG_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SPLITS,
    vocabulary_file,
)

_WINDOWS = """
    user_past AS (PARTITION BY event_user ORDER BY event_time RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
    item_past AS (PARTITION BY event_item ORDER BY event_time RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
    user_order AS (PARTITION BY event_user ORDER BY event_time, event_row)"""
_RECBOLE_TYPES = ("token", "float", "token_seq", "float_seq")


@dataclass
class PrepareRankingConfig:
    """What to prepare, and where to.

    Attributes:
        events: the log: parquet, csv or RecBole ``.inter``; a file or a glob.
        users: attributes of users, one row each, in such a file; empty for none.
        items: attributes of items, likewise.
        output: the dataset's folder; it must not exist, or be empty.
        user_column: the column of user ids, in ``events`` and ``users``.
        item_column: the column of item ids, in ``events`` and ``items``.
        time_column: the column of times, whole numbers or timestamps.
        tasks: name → expression of what is to be predicted: a boolean has a probability, a number its value; null for an
            event that says nothing of the task. Validation watches the first.
        sparse: name → expression of a categorical feature, or of a list of such values, which are pooled.
        dense: name → expression of a number; it is scaled to mean 0 and deviation 1, and 0 where it is null.
        sequence: name → expression of what the history tells of each event besides its item: one value each.
        valid_share: share of the events, the last ones before the test period, that validation has.
        test_share: share of the events, the last ones, that the test has.
        examples: also write the events of a period, ``valid`` or ``test``, to ``examples.parquet``: the raw values of all
            features and tasks, as mode rank of the program score reads them; empty for none.
        task: ``ranking``.
    """

    events: str = MISSING
    output: str = MISSING
    users: str = ""
    items: str = ""
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    tasks: dict[str, str] = field(default_factory=dict)
    sparse: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    sequence: dict[str, str] = field(default_factory=dict)
    valid_share: float = 0.1
    test_share: float = 0.1
    examples: str = ""
    task: str = "ranking"

    def __post_init__(self):
        check("task", self.task, self.task == "ranking", "ranking")
        check("tasks", dict(self.tasks), len(self.tasks) >= 1, "at least one name: expression")
        for key in ("valid_share", "test_share"):
            check(key, getattr(self, key), 0 < getattr(self, key) < 0.5, "greater than 0 and less than 0.5")
        for group in ("tasks", "sparse", "dense", "sequence"):
            for name in getattr(self, group):
                # TorchRec keeps tables in a ModuleDict and features in dotted names.
                check(f"name of {group}", name, name.replace("_", "a").isalnum(), "made of letters, digits and _")
        one_of("examples", self.examples, ("", *SPLITS[1:]))
        check("sequence", ITEM, ITEM not in self.sequence, f"without {ITEM!r}: the items themselves are always there")


def prepare_ranking(config: PrepareRankingConfig) -> dict[str, Any]:
    """Make a ranking dataset; it appears at ``config.output`` whole or not at all.

    Every row of the log becomes an event, or is counted in the manifest with the first reason why not. The rows of the
    training period also become ``train_log.parquet``, which ``launch/prepare.py`` takes: an encoder pre-trained on it has
    seen nothing of validation and test.

    Returns:
        The manifest.

    Raises:
        InputError: a file cannot be read or lacks a column, an expression is wrong or of the wrong type, or a period has no
            event.
    """
    output = Path(config.output)
    check_free("output", output)
    with folder_aside(output) as folder:
        with scratch_database(folder / ".work") as db:
            try:
                set_aside = _stage(db, config)
                events = _compute(db, config)
                log_file = str(folder / LOG_FILE).replace("'", "''")
                db.execute(f"""COPY (SELECT event_user AS user_id, event_item AS item_id, event_time AS timestamp FROM staged
                    WHERE event_split = 0 ORDER BY event_row) TO '{log_file}' (FORMAT parquet)""")
            except duckdb.Error as error:
                raise InputError(f"preparing {config.events!r}: {_first_line(error)}") from error
        manifest = _write(folder, events, config, set_aside)
        if config.examples:
            pq.write_table(example_rows(events, config.examples), folder / EXAMPLES_FILE, compression="zstd")
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _stage(db: duckdb.DuckDBPyConnection, config: PrepareRankingConfig) -> dict[str, int]:
    """Join events and attributes into the table ``staged``; count the rows that cannot be used."""
    user, item, time = (_quoted(name) for name in (config.user_column, config.item_column, config.time_column))
    _read(db, "events", config.events)
    db.execute("CREATE TABLE numbered AS SELECT *, row_number() OVER () AS event_row FROM events")
    joins = ""
    for table, location, key in (("users", config.users, user), ("items", config.items, item)):
        if location:
            _read(db, table, location)
            total, distinct = db.execute(f"SELECT count(*), count(DISTINCT {key}) FROM {table}").fetchall()[0]
            if total != distinct:
                raise InputError(f"{table}={location} has {total} rows for {distinct} ids in {key}; one row each is needed")
            joins += f" LEFT JOIN {table} USING ({key})"
    columns = dict(db.execute("SELECT column_name, column_type FROM (DESCRIBE events)").fetchall())
    # DuckDB knows a column by its name in upper and lower case alike.
    kind = {name.lower(): kind for name, kind in columns.items()}.get(config.time_column.lower())
    if kind is None:
        raise InputError(f"events={config.events} has no time_column {config.time_column!r}; it has {', '.join(columns)}")
    number = f"epoch_us({time}::TIMESTAMP)" if kind.startswith(("TIMESTAMP", "DATE")) else f"TRY_CAST({time} AS BIGINT)"
    db.execute(f"""CREATE TABLE joined AS SELECT *, {user} AS event_user, {item} AS event_item, {number} AS event_time
        FROM numbered{joins}""")
    parts = ("user", "item", "time")
    # A row counts once: for the first of its parts that is missing.
    reason = f"CASE {' '.join(f'WHEN event_{part} IS NULL THEN {part!r}' for part in parts)} END"
    counts = dict(db.execute(f"SELECT {reason}, count(*) FROM joined GROUP BY ALL").fetchall())
    usable = f"{reason} IS NULL"
    bounds = [round(1 - config.valid_share - config.test_share, 9), round(1 - config.test_share, 9)]
    (limits,) = db.execute(f"SELECT quantile_disc(event_time, {bounds}) FROM joined WHERE {usable}").fetchall()[0]
    if limits is None:
        raise InputError(f"events={config.events} has no row with a user, an item and a time")
    split = " + ".join(f"(event_time > {limit})::INT" for limit in limits)
    db.execute(f"CREATE TABLE staged AS SELECT *, {split} AS event_split FROM joined WHERE {usable}")
    return {f"null_or_bad_{part}": counts.get(part, 0) for part in parts}


def _compute(db: duckdb.DuckDBPyConnection, config: PrepareRankingConfig) -> pa.Table:
    """Compute every expression: a row per event, users one after the other, each in order of time."""
    wanted = {
        f"{group}:{name}": text
        for group in ("tasks", "sparse", "dense", "sequence")
        for name, text in getattr(config, group).items()
    }
    columns = "".join(f", ({text}) AS {_quoted(name)}" for name, text in wanted.items())
    return db.execute(f"""SELECT event_user AS user, event_item AS item, event_split::TINYINT AS split,
        count(*) OVER user_past AS seen{columns} FROM staged WINDOW {_WINDOWS} ORDER BY event_user, event_time, event_row
        """).to_arrow_table()


def example_rows(events: pa.Table, split: str) -> pa.Table:
    """Write the events of a period out, each with its own history, as `glintru_rec.scoring.examples` has them.

    Args:
        events: users one after the other, each in order of time: user, item, split, seen, and the values of expressions.
        split: of `SPLITS`.
    """
    chosen = np.flatnonzero(events["split"].to_numpy() == SPLITS.index(split))
    starts = _starts(events["user"].combine_chunks())
    first = starts[np.searchsorted(starts, chosen, side="right") - 1]
    seen = events["seen"].to_numpy()[chosen]
    offsets = np.concatenate([[0], np.cumsum(seen)])
    past = pa.array(np.repeat(first - offsets[:-1], seen) + np.arange(offsets[-1]))

    def histories(name: str) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), events[name].take(past).combine_chunks())

    own = events.take(pa.array(chosen))
    columns = {"user_id": own["user"], "item_id": own["item"], "history": histories("item")}
    for name in events.column_names:
        if name.startswith("sequence:"):
            columns[name.replace(":", ".")] = histories(name)
        elif ":" in name:
            columns[name.replace(":", ".")] = own[name]
    return pa.table(columns)


def _starts(users: pa.Array) -> np.ndarray:
    """Say where each user's events begin."""
    return np.flatnonzero(np.append(True, pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)))


def _write(folder: Path, events: pa.Table, config: PrepareRankingConfig, set_aside: dict[str, int]) -> dict[str, Any]:
    """Encode the columns, write them and the vocabularies, and describe them."""
    split = events["split"].to_numpy()
    counts = {name: int((split == place).sum()) for place, name in enumerate(SPLITS)}
    if not all(counts.values()):
        raise InputError(f"the periods have {counts} events; each needs some: change valid_share and test_share")
    users = events["user"].combine_chunks()
    starts = _starts(users)
    written = {
        "user": pa.array(np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(users))))),
        "split": events["split"],
        "seen": events["seen"],
    }
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "num_users": len(starts), "events": counts}
    manifest |= {"set_aside": set_aside, "num_embeddings": {}, "dense": {}, "tasks": {}}
    (folder / "vocabulary").mkdir()
    categorical = {ITEM: events["item"]} | {
        name: events[name] for name in events.column_names if name.startswith(("sparse:", "sequence:"))
    }
    for name, column in categorical.items():
        if name.startswith("sequence:") and pa.types.is_nested(column.type):
            raise InputError(
                f"{name.replace(':', '.')} gives {column.type}: a history has one value of each event; lists belong in sparse"
            )
        written[name], vocabulary = _encode(column.combine_chunks(), split == 0)
        pq.write_table(vocabulary, folder / vocabulary_file(name))
        manifest["num_embeddings"][name] = len(vocabulary) + 1
    for name in config.dense:
        numbers = _numbers(f"dense.{name}", events[f"dense:{name}"])
        known = numbers[(split == 0) & np.isfinite(numbers)]
        mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)
        written[f"dense:{name}"] = np.where(np.isfinite(numbers), (numbers - mean) / (deviation or 1), 0).astype(np.float32)
        manifest["dense"][name] = {"mean": mean, "deviation": deviation}
    for name in config.tasks:
        column = events[f"tasks:{name}"]
        manifest["tasks"][name] = "binary" if pa.types.is_boolean(column.type) else "number"
        written[f"tasks:{name}"] = _numbers(f"tasks.{name}", column).astype(np.float32)
    manifest["expressions"] = {group: dict(getattr(config, group)) for group in ("tasks", "sparse", "dense", "sequence")}
    pq.write_table(pa.table(written), folder / EVENTS_FILE, compression="zstd")
    return manifest


def _numbers(key: str, column: pa.ChunkedArray) -> np.ndarray:
    """Give the values of an expression as float64, NaN where it is null."""
    try:
        return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
    except pa.ArrowException as error:
        raise InputError(f"{key} gives {column.type}, which is no number: {error}") from error


def _encode(column: pa.Array, is_training: np.ndarray) -> tuple[pa.Array, pa.Table]:
    """Number the values of the training period from 1, by falling count; others and null are 0. Lists stay lists."""
    if pa.types.is_list(column.type):
        column = column.fill_null([])
        flat = column.flatten()
        codes, vocabulary = _encode(flat, np.repeat(is_training, pc.list_value_length(column).to_numpy()))
        return pa.ListArray.from_arrays(column.offsets, codes), vocabulary
    values = column.filter(pa.array(is_training)).drop_null()
    table = pa.table({"value": values}).group_by("value").aggregate([("value", "count")])
    table = table.sort_by([("value_count", "descending"), ("value", "ascending")]).rename_columns(["value", "count"])
    if not len(table):
        return pa.array(np.zeros(len(column), np.int64)), table
    return pa.array(rows_of(column, table["value"].combine_chunks())), table


def _read(db: duckdb.DuckDBPyConnection, table: str, location: str) -> None:
    """Load a file as it is; columns of RecBole files lose the type behind their name."""
    path = location.replace("'", "''")
    reader = f"read_parquet('{path}')" if location.endswith(".parquet") else f"read_csv('{path}')"
    try:
        db.execute(f"CREATE TABLE {table} AS SELECT * FROM {reader}")
    except duckdb.Error as error:
        raise InputError(f"{table}={location} cannot be read: {_first_line(error)}") from error
    for (column,) in db.execute(f"SELECT column_name FROM (DESCRIBE {table})").fetchall():
        name, _, kind = column.rpartition(":")
        if name and kind in _RECBOLE_TYPES:
            db.execute(f"ALTER TABLE {table} RENAME COLUMN {_quoted(column)} TO {_quoted(name)}")


def _first_line(error: duckdb.Error) -> str:
    return str(error).strip().splitlines()[0]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
