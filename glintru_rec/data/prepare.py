"""Prepare a dataset: from an interaction log to sequences that training can read.

::

    PrepareConfig -> open_log -> stage -> clean -> drop_rare -> write -> rename
                     (formats)  (         cleaning         )    (writing)
                        base ------------^ (growing)

The same log gives the same bytes, whatever the engine and the number of threads: every order below is total. Rows in = events
kept + rows set aside, each of the latter with its reason.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glintru_rec.config import one_of
from glintru_rec.data.cleaning import clean, drop_rare, stage
from glintru_rec.data.dataset_files import MANIFEST_FILE, SCHEMA_VERSION, SET_ASIDE_FILE
from glintru_rec.data.engine import DuckDBEngine, Engine, fetch_one
from glintru_rec.data.formats import LogColumns, LogFile, open_log
from glintru_rec.data.growing import Base
from glintru_rec.data.scratch import scratch_database
from glintru_rec.data.spark import SparkConfig, spark_engine
from glintru_rec.data.writing import (
    statistics,
    write_rare,
    write_sequences,
    write_set_aside,
    write_side_vocabulary,
    write_vocabulary,
)
from glintru_rec.errors import InputError
from glintru_rec.files import check_free, folder_aside, sha256_of
from glintru_rec.progress import format_seconds

ENGINES = ("duckdb", "spark")
IDS = ("dense", "raw")


@dataclass
class PrepareConfig:
    """What to prepare, and where to.

    Attributes:
        input: the log: a file, a folder or a glob. Its format is recognised by content (see `formats`).
        output: the dataset's folder; it must not exist, or be empty.
        min_user_events: users with fewer events are left out, at least 1.
        min_item_events: items with fewer events are left out. Both are applied until neither removes anything. Where it is
            not given: 5, or with ``ids=raw`` 1, which leaves none out.
        user_column: the column of user ids, int64 or string.
        item_column: the column of item ids, int64 or string.
        time_column: the column of times.
        side_columns: columns that tell more of each event, such as its action type, a rating or a bucket of the time since the
            last one: whole numbers, booleans or strings, of at most 10,000 values each. A model reads those that
            ``model.side_features`` of the program train names. Null is an unknown value. Events of one user, item and time are
            one event, the first, whatever these columns say.
        threads: threads of DuckDB; 0 for one per core.
        memory_limit: memory that DuckDB may use before it spills to disk beside the output, such as ``8GB``; empty for most
            of the machine's.
        ids: ``dense``: each item gets an index, by which sequences hold it, and a place in the vocabulary. ``raw``: sequences
            hold the ids of the log, int64 or strings, for ``data.vocabulary=dynamic`` of the program train; items are neither
            listed nor counted, however many there are.
        base: a dataset that the log continues: its events come before the log's, its items keep their indices, and ``output``
            gets both. Its ``min_user_events`` and ``min_item_events`` must be the same. Empty: the log is all there is.
        engine: ``duckdb``, in this process and out of core, or ``spark``, which can be a cluster; the same dataset to the byte.
        spark: the session of ``engine=spark``.
        task: ``retrieval``; with ``ranking``, the keys are other ones (``task=ranking --help``).
    """

    input: str
    output: str
    min_user_events: int = 5
    min_item_events: int | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    side_columns: list[str] = field(default_factory=list)
    threads: int = 0
    memory_limit: str = ""
    ids: str = "dense"
    base: str = ""
    engine: str = "duckdb"
    spark: SparkConfig = field(default_factory=SparkConfig)
    task: str = "retrieval"

    def __post_init__(self) -> None:
        for name in ("input", "output", "user_column", "item_column", "time_column"):
            if not getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a text that is not empty")
        one_of("ids", self.ids, IDS)
        if self.min_item_events is None:
            self.min_item_events = 1 if self.raw else 5
        if self.raw and self.min_item_events != 1:
            raise InputError(f"min_item_events is {self.min_item_events}, but ids=raw counts no items: leave it, or give 1")
        for name, least in (("min_user_events", 1), ("min_item_events", 1), ("threads", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        columns = (self.user_column, self.item_column, self.time_column)
        if len({name.lower() for name in columns}) < 3:
            raise InputError(f"user_column, item_column and time_column are {columns}; they must be three different columns")
        side = [name.lower() for name in self.side_columns]
        if not all(side) or len({*side, *(name.lower() for name in columns)}) < len(side) + 3:
            raise InputError(f"side_columns are {self.side_columns}; they must differ from each other and from {columns}")
        if not re.fullmatch(r"(\d+(\.\d+)? ?[KMGT]i?B)?", self.memory_limit):
            raise InputError(f"memory_limit is {self.memory_limit!r}; it must be like '8GB', or empty")
        if self.base and self.side_columns:
            raise InputError(f"side_columns are {self.side_columns}, and a base's events have none; prepare all days at once")
        one_of("engine", self.engine, ENGINES)
        if self.engine == "spark" and (self.threads or self.memory_limit):
            raise InputError("threads and memory_limit are DuckDB's; with engine=spark, set spark.master and spark.conf")
        if self.engine == "duckdb" and self.spark != SparkConfig():
            raise InputError("spark.master and spark.conf are given, but the engine is duckdb; give engine=spark")

    @property
    def raw(self) -> bool:
        """Whether sequences hold the ids of the log."""
        return self.ids == "raw"

    @property
    def filters(self) -> dict[str, int]:
        """The fewest events of a user and of an item."""
        assert self.min_item_events is not None, "set where it was not given"
        return {"min_user_events": self.min_user_events, "min_item_events": self.min_item_events}


@dataclass(frozen=True)
class PrepareReport:
    """What came of it.

    Attributes:
        output: the dataset's folder.
        manifest: what its ``manifest.json`` holds.
    """

    output: str
    manifest: dict[str, Any]

    def summary_rows(self) -> list[tuple[str, str]]:
        """Give names and values for a table; a reason that no row had is left out."""
        shown = ("rows_in", "num_events", "num_users", "num_items")
        counts = [(name, self.manifest[name]) for name in shown if name in self.manifest]
        counts += [(f"set aside: {reason}", count) for reason, count in self.manifest["set_aside"].items() if count]
        counts += [(name, self.manifest[name]) for name in ("out_of_order_rows", "users_too_short_to_split")]
        counts += [(name, count) for name, count in self.manifest.get("growth", {}).items() if isinstance(count, int)]
        lengths = ", ".join(f"{name} {length}" for name, length in self.manifest["length_quantiles"].items())
        rows = [(name.replace("_", " ").removeprefix("num "), f"{count:,}") for name, count in counts]
        return [*rows, ("events per user", lengths), ("dataset", self.output)]

    def __str__(self) -> str:
        rows = self.summary_rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print) -> PrepareReport:
    """Turn a log into a dataset. It appears at ``config.output`` whole or not at all.

    Times are int64: whole numbers stay as the log gives them; if one number has a fraction, all are read as seconds and become
    microseconds; timestamps and dates become microseconds since 1970, UTC. Events with equal times keep the log's order. Where
    a base's times were seconds with a fraction, whole numbers of a text log are seconds too.

    Args:
        config: what to prepare.
        progress: is told what is being done, a line per stage.

    Raises:
        InputError: the log or the output folder cannot be used.
    """
    output = Path(config.output)
    check_free("output", output)
    base = Base.open(Path(config.base), config.filters, config.raw) if config.base else None
    names = LogColumns(config.user_column, config.item_column, config.time_column, tuple(config.side_columns))
    files = open_log(config.input, names)
    start = time.monotonic()

    def say(message: str) -> None:
        progress(f"{format_seconds(time.monotonic() - start)}  {message}")

    say(f"reading {len(files)} file(s), {files[0].format}")
    with folder_aside(output) as folder:
        with _open_engine(folder / ".work", config) as engine:
            manifest = _write_dataset(engine, folder, files, names, config, base, say)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return PrepareReport(config.output, manifest)


@contextmanager
def _open_engine(folder: Path, config: PrepareConfig) -> Iterator[Engine]:
    if config.engine == "spark":
        with spark_engine(folder, config.spark) as engine:
            yield engine
    else:
        with scratch_database(folder, config.threads, config.memory_limit) as db:
            yield DuckDBEngine(db)


def _write_dataset(
    engine: Engine,
    folder: Path,
    files: list[LogFile],
    names: LogColumns,
    config: PrepareConfig,
    base: Base | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run every stage, write all files but the manifest, and return the manifest."""
    columns = stage(engine, files, names, base.num_rows if base else 0)
    num_rows = fetch_one(engine, "SELECT count(*) FROM log")
    say(f"read {num_rows:,} rows")
    base_events, base_items = base.open_tables(engine) if base else ("", "")
    cleaned = clean(engine, files, names, columns, base.types if base else None, base_events)
    write_set_aside(engine, folder, base.path / SET_ASIDE_FILE if base else None)
    if not names.side:
        engine.drop("log")
    reasons = "SELECT reason, count(*) FROM event WHERE reason IS NOT NULL GROUP BY reason"
    counts = Counter(dict(engine.rows(reasons)))
    if base:
        num_rows += base.num_rows
        counts.update(base.set_aside)
    say(f"cleaned {num_rows:,} rows")
    set_aside = dict(sorted(counts.items())) | drop_rare(engine, **config.filters, raw=config.raw)
    num_events = fetch_one(engine, "SELECT count(*) FROM kept")
    assert num_rows == num_events + sum(set_aside.values()), "every row is an event or is set aside"
    if not num_events:
        lost = ", ".join(f"{reason} {count}" for reason, count in set_aside.items() if count) or "none"
        raise InputError(
            f"no event is left of the {num_rows} rows in {config.input!r} (set aside: {lost}); lower min_user_events "
            f"({config.min_user_events}) and min_item_events ({config.min_item_events}) or correct the log"
        )
    say(f"kept {num_events:,} events")
    vocabulary = None if config.raw else write_vocabulary(engine, folder, cleaned, base_items)
    side = write_side_vocabulary(engine, folder, names.side)
    parts = write_sequences(engine, folder, cleaned, side, config.raw)
    write_rare(engine, folder, cleaned, config.raw)
    say(f"wrote {len(parts)} part(s)")
    items: dict[str, Any]
    if vocabulary is None:
        checksums = "".join(sha256_of(folder / part["file"]) for part in parts)
        items = {"ids": "raw", "sequences_sha256": hashlib.sha256(checksums.encode()).hexdigest()}
    else:
        items = {"num_items": vocabulary.num_items, "vocabulary_sha256": vocabulary.sha256}
    num_users = sum(part["num_users"] for part in parts)
    sources = [{"path": str(file.path), "bytes": file.path.stat().st_size} for file in files]
    return {
        "schema_version": SCHEMA_VERSION,
        "num_users": num_users,
        "num_events": num_events,
        "num_files": len(parts),
        "user_id_type": cleaned.user_type,
        "item_id_type": cleaned.item_type,
        "time_unit": cleaned.time_unit,
        **({"times_were_seconds": True} if cleaned.were_seconds else {}),
        "tie_policy": "log_order",
        **items,
        **({"side_features": dict(zip(side.names, side.sizes))} if side.names else {}),
        "filters": config.filters,
        "rows_in": num_rows,
        "set_aside": set_aside,
        **statistics(engine),
        **({"growth": base.growth(engine, num_events, num_users, vocabulary)} if base else {}),
        "parts": parts,
        "source": {
            "format": files[0].format,
            "columns": {name: value for name, value in asdict(names).items() if value},
            "files": [*(base.manifest["source"]["files"] if base else []), *sources],
        },
    }
