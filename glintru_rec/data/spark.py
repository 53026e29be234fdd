"""Spark as the engine of `prepare`: a local session, or a cluster's.

All work on events is Spark SQL, so the executors need neither Python nor this package; they read the log and keep their tables
in the output's folder, which therefore lies where driver and executors all see it under one path. Text logs are parsed by the
driver, with DuckDB, for one reading of quotes and line ends; the parts of the dataset are written by the driver.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.data.engine import Columns, read_log
from glintru_rec.data.formats import Format, LogColumns, LogFile
from glintru_rec.errors import InputError
from glintru_rec.progress import Progress

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_FILES_AT_ONCE = 64
_SESSION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.enforceReservedKeywords": "false",
    "spark.sql.legacy.parquet.nanosAsLong": "true",  # Spark has no nanoseconds and refuses such files otherwise
    "spark.sql.caseSensitive": "false",
}
_FUNCTIONS = (
    r"matches(text STRING, pattern STRING) RETURNS BOOLEAN RETURN text RLIKE concat('^(?:', pattern, r')\z')",
    "micros(text STRING) RETURNS BIGINT RETURN unix_micros(TRY_CAST(text AS TIMESTAMP))",
)


@dataclass
class SparkConfig:
    """The Spark session.

    Attributes:
        master: ``local[N]`` for N threads in this process (``local[*]``: one per core), ``spark://…``, ``yarn``, ``k8s://…``;
            empty for what Spark's own configuration, or spark-submit, says.
        conf: Spark's own settings, each ``NAME=VALUE``, such as ``spark.driver.memory=16g``.
    """

    master: str = "local[*]"
    conf: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for setting in self.conf:
            if not re.fullmatch(r"spark\.[^=\s]+=.*", setting):
                raise InputError(f"spark.conf holds {setting!r}; it must be like 'spark.driver.memory=16g'")


@contextmanager
def spark_engine(folder: Path, config: SparkConfig) -> Iterator["SparkEngine"]:
    """Lend an engine with its tables in ``folder``, which is gone afterwards.

    A Spark session that this process has already is used, as it is, and goes on; else one is started, and stopped at the end.

    Raises:
        InputError: pyspark or Java is missing, Spark does not start or gives up, or a running session should be another one.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError("engine=spark needs pyspark, which is not installed: pip install 'pyspark>=4,<5'") from error
    running = SparkSession.getActiveSession()
    if running is not None and config != SparkConfig():
        own = f"this process has a Spark session already ({running.sparkContext.master})"
        raise InputError(f"{own}, so spark.master and spark.conf change nothing; set them there")
    session = running or _start(config)
    folder.mkdir()
    try:
        yield SparkEngine(session.newSession(), folder)
    except _spark_errors() as error:
        raise InputError(f"Spark gave up: {_reason(error)}") from error
    finally:
        if running is None:
            session.stop()
    shutil.rmtree(folder)


def _start(config: SparkConfig) -> "SparkSession":
    from pyspark.sql import SparkSession

    java = shutil.which("java", path=f"{os.environ['JAVA_HOME']}/bin") if "JAVA_HOME" in os.environ else shutil.which("java")
    if java is None:
        where = f"JAVA_HOME={os.environ['JAVA_HOME']}" if "JAVA_HOME" in os.environ else "PATH"
        raise InputError(f"engine=spark needs Java 17 or later, and there is no java in {where}; install a JRE")
    builder: Any = SparkSession.builder.appName("glintru_rec prepare")
    # The catalog and the parts of the dataset come to the driver, which bounds them itself.
    builder = builder.config("spark.driver.maxResultSize", "0").config("spark.log.level", "ERROR")
    if config.master:
        builder = builder.master(config.master)
    for setting in config.conf:
        builder = builder.config(*setting.split("=", 1))
    try:
        return builder.getOrCreate()
    except _spark_errors() as error:
        raise InputError(f"Spark does not start with spark.master={config.master!r}: {_reason(error)}") from error


class SparkEngine:
    """Spark; see `glintru_rec.data.engine.Engine` for the methods.

    Args:
        session: whose temporary views and settings are this engine's own.
        folder: empty, for the tables; all executors see it under this path.
    """

    def __init__(self, session: "SparkSession", folder: Path):
        self._session, self._folder = session, folder
        self._versions: dict[str, int] = {}
        for key, value in _SESSION.items():
            session.conf.set(key, value)
        for function in _FUNCTIONS:
            session.sql(f"CREATE TEMPORARY FUNCTION {function}")

    def stage(self, files: Sequence[LogFile], names: LogColumns, columns: Columns, first: int) -> None:  # noqa: D102
        places = []
        progress = Progress("reading", len(files), "files")
        target = self._next_folder("log")
        for start in range(0, len(files), _FILES_AT_ONCE):
            progress.update(start)
            frames = []
            for file in files[start : start + _FILES_AT_ONCE]:
                frame, num_rows = self._open_log(file, names, columns, first)
                frames.append(frame)
                places.append((str(file.path), first, num_rows))
                first += num_rows
            union = frames[0]
            for frame in frames[1:]:
                union = union.unionAll(frame)
            union.write.mode("append").parquet(str(target))
        self._open("log", [str(target)])
        self._session.createDataFrame(places, "path STRING, first BIGINT, num_rows BIGINT").createTempView("file")
        staged, expected = self.rows("SELECT count(*) FROM log")[0][0], sum(num_rows for _, _, num_rows in places)
        if staged != expected:  # Spark passes over some names of files without a word
            raise InputError(f"Spark read {staged} of the log's {expected} rows; give files whose names start with a letter")

    def _open_log(self, file: LogFile, names: LogColumns, columns: Columns, first: int) -> tuple["DataFrame", int]:
        """Give a file's rows as ``log`` has them, and their number."""
        roles = ["user_raw", "item_raw", "time_raw", *(f"side_{place}" for place in range(len(names.side)))]
        if file.format is Format.PARQUET:
            path, (user, item, time, *side) = file.path, [f"`{name.replace('`', '``')}`" for name in names]
        else:
            path, (user, item, time, *side) = self._parse_text(file, names, roles), roles
        frame = self._session.read.parquet(_escaped(path))
        if columns[2].kind == "timestamp":
            is_nanos = dict(frame.select(frame[time].alias("time")).dtypes)["time"] == "bigint"
            time = f"{time} DIV 1000" if is_nanos else f"unix_micros(CAST({time} AS TIMESTAMP))"
        types = [*(column.sql_type for column in columns), *("STRING" for _ in side)]
        values = zip((user, item, time, *side), types, roles)
        selected = [f"CAST({value} AS {sql_type}) AS {role}" for value, sql_type, role in values]
        return frame.selectExpr(f"{first} + _metadata.row_index AS position", *selected), pq.read_metadata(path).num_rows

    def _parse_text(self, file: LogFile, names: LogColumns, roles: list[str]) -> Path:
        """Write a text file as parquet, rows in their order."""
        path = self._next_folder("text").with_suffix(".parquet")
        query, parameters = file.query(names)
        target = str(path).replace("'", "''")
        with duckdb.connect() as db:
            read_log(db, file, f"COPY (SELECT {', '.join(roles)} FROM ({query})) TO '{target}'", parameters)
        return path

    def create(self, table: str, query: str) -> None:  # noqa: D102
        target = self._next_folder(table)
        self._session.sql(query).write.parquet(str(target))
        self._open(table, [str(target)])

    def remove(self, table: str, key: str, query: str) -> int:  # noqa: D102
        num_removed = self.rows(f"SELECT count(*) FROM {table} SEMI JOIN ({query}) USING ({key})")[0][0]
        if num_removed:
            old = self._folder_of(table)
            self.create(table, f"SELECT * FROM {table} ANTI JOIN ({query}) USING ({key})")
            shutil.rmtree(old)
        return num_removed

    def drop(self, table: str) -> None:  # noqa: D102
        self._session.catalog.dropTempView(table)
        shutil.rmtree(self._folder_of(table))

    def open_parquet(self, table: str, files: Sequence[Path], lists: Sequence[str] = ()) -> None:  # noqa: D102
        frame = self._session.read.parquet(*[_escaped(file) for file in files])
        if lists:
            others = [name for name in frame.columns if name not in lists]
            frame = frame.selectExpr(*others, f"inline(arrays_zip({', '.join(lists)})) AS ({', '.join(lists)})")
        frame.createTempView(table)

    def rows(self, query: str) -> list[tuple]:  # noqa: D102
        return [tuple(row) for row in self._session.sql(query).collect()]

    def arrow(self, query: str) -> pa.Table:  # noqa: D102
        return self._session.sql(query).toArrow()

    def _open(self, table: str, paths: list[str]) -> None:
        self._session.read.parquet(*[_escaped(Path(path)) for path in paths]).createOrReplaceTempView(table)

    def _next_folder(self, table: str) -> Path:
        """Name a new folder for a table, whose rows may still be read from its present one."""
        self._versions[table] = self._versions.get(table, 0) + 1
        return self._folder_of(table)

    def _folder_of(self, table: str) -> Path:
        return self._folder / f"{table}-{self._versions[table]}"


def _escaped(path: Path) -> str:
    """Write a path for Spark, which takes every path for a pattern."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", str(path.absolute()))


def _spark_errors() -> tuple[type[Exception], ...]:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    return PySparkException, Py4JError, OSError


def _reason(error: BaseException) -> str:
    """Say in one line why Spark failed: the first condition that it names (they start with ``[NAME]``), or the first line."""
    text = str(error).strip() or type(error).__name__
    condition = re.search(r"\[[A-Z][A-Z0-9_.]+\][^\n]*", text)
    return (condition[0] if condition else text.splitlines()[0])[:300]
