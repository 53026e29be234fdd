"""Spark gives DuckDB's very bytes, from the same queries, in a real session."""

import importlib.util
import json
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import glintru_rec.data.writing as writing
from glintru_rec.config import compose
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.data.spark import SparkConfig
from glintru_rec.errors import InputError

HAS_JAVA = shutil.which("java") is not None or "JAVA_HOME" in os.environ
HAS_PYSPARK = importlib.util.find_spec("pyspark") is not None
needs_spark = pytest.mark.skipif(not (HAS_JAVA and HAS_PYSPARK), reason="engine=spark needs Java 17 and pyspark")
# For many queries over few rows, interpreting them is faster than compiling them.
CONF = {
    "spark.log.level": "ERROR",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
}


@pytest.fixture(scope="session")
def spark_session():
    """One session for all tests; `prepare` uses what is there."""
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[2]").config(map=CONF).getOrCreate()
    yield session
    session.stop()


def run(log: Path, output: Path, engine: str, **options) -> dict:
    config = PrepareConfig(str(log), str(output), engine=engine, **options)
    return prepare(config, progress=lambda message: None).manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_log(path: Path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=500)


def make_columns(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and times with many ties, repeats and rare items."""
    users = np.where(rng.random(size) < 0.05, rng.integers(100, 200, size), rng.integers(0, 80, size))
    return users, (rng.pareto(0.7, size) * 5).astype(np.int64) % 10**6, rng.integers(0, 25, size) - 3


def with_nulls(rng: np.random.Generator, values: pa.Array) -> pa.Array:
    return pc.if_else(pa.array(rng.random(len(values)) < 0.02), None, values)


@needs_spark
def test_spark_gives_the_same_bytes(tmp_path, spark_session, monkeypatch):
    """Ids of several widths, then a day more; ties, nulls, duplicates, rare users and items; paths that look like patterns."""
    monkeypatch.setattr(writing, "EVENTS_PER_PART", 2000)
    monkeypatch.setattr(writing, "_POSITIONS_PER_ROW_GROUP", 4000)
    rng = np.random.default_rng(0)
    widths = {"days/a[1].parquet": pa.int32(), "days/b?.parquet": pa.uint64(), "more.parquet": pa.int64()}
    for name, width in widths.items():
        user, item, time = make_columns(rng, 1500)
        users = pa.array(np.where(rng.random(1500) < 0.02, -1, user))
        items = pa.array(item).cast(width)
        if width == pa.uint64():
            items = pa.concat_arrays([items.slice(1), pa.array([2**63 + 5], pa.uint64())])
        columns = {"user_id": users, "item_id": items, "timestamp": pa.array(time)}
        write_log(tmp_path / name, **{name: with_nulls(rng, column) for name, column in columns.items()})
    for engine in ("duckdb", "spark"):
        run(tmp_path / "days", tmp_path / engine, engine)
        run(tmp_path / "more.parquet", tmp_path / f"{engine}-grown", engine, base=str(tmp_path / "duckdb"))
    run(tmp_path / "days", tmp_path / "raw", "duckdb", ids="raw")
    for engine in ("duckdb", "spark"):
        run(tmp_path / "more.parquet", tmp_path / f"{engine}-raw", engine, ids="raw", base=str(tmp_path / "raw"))
    for suffix in ("", "-raw", "-grown"):
        ours, theirs = files_of(tmp_path / f"spark{suffix}"), files_of(tmp_path / f"duckdb{suffix}")
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
        manifest = json.loads(ours["manifest.json"])
        assert manifest["num_files"] > 1
        reasons = ["duplicate_event", "item_beyond_int64", "negative_user", "null_item", "null_timestamp", "null_user"]
        rare = ["rare_user"] if "raw" in suffix else ["rare_user", "rare_item"]
        assert [reason for reason, count in manifest["set_aside"].items() if count] == [*reasons, *rare]
        assert manifest["out_of_order_rows"] > 0
    assert manifest["growth"]["returned_events"] > 0
    assert manifest["growth"]["late_events"] > 0
    assert not list(tmp_path.glob(".partial-*"))


@needs_spark
@pytest.mark.parametrize("form", ["nanoseconds", "csv"])
def test_spark_reads_text_and_times_alike(tmp_path, spark_session, form):
    rng = np.random.default_rng(1)
    user, item, _ = make_columns(rng, 800)
    users, items = [f"ü{u}" for u in user], [f'"{i}, 00{i}' if i % 3 else str(i) for i in item]
    if form == "nanoseconds":
        times = pa.array(rng.integers(-5000, 5000, 800), pa.timestamp("ns"))
        columns = {"user_id": pa.array(users).dictionary_encode(), "item_id": items, "timestamp": with_nulls(rng, times)}
        write_log(tmp_path / "log", **columns, **{"a side": with_nulls(rng, pa.array(rng.random(800) < 0.5))})
    else:
        moments = [datetime(1969, 12, 31, tzinfo=UTC) + timedelta(milliseconds=int(n)) for n in rng.integers(0, 10**9, 800)]
        written = [
            "{:%Y/%m/%d %H:%M:%S.%f}",
            "{:%Y-%m-%dT%H:%M:%SZ}",
            "{:%Y-%m-%d %H:%M:%S+01:30}",
            "{:%Y-%m-%d}",
            "{:%d.%m.%Y}",
            "{:%Y-%m-%d %H:%M:%SUTC}",  # Spark alone could read it
            "",
        ]
        times = [written[n].format(moment) for n, moment in zip(rng.integers(0, len(written), 800), moments)]
        quoted = [item.replace('"', '""') for item in items]
        actions = rng.choice(["view", "buy", ""], 800)
        lines = [f'{user},"{item}",{time},{action}\r\n' for user, item, time, action in zip(users, quoted, times, actions)]
        (tmp_path / "log").write_text("user_id,item_id,timestamp,a side\r\n" + "".join(lines), newline="")
    for engine in ("duckdb", "spark"):
        run(tmp_path / "log", tmp_path / engine, engine, min_user_events=1, min_item_events=1, side_columns=["a side"])
    assert files_of(tmp_path / "spark") == files_of(tmp_path / "duckdb")


@needs_spark
def test_spark_names_a_corrupt_file(tmp_path, spark_session):
    write_log(tmp_path / "log", user_id=np.arange(5000), item_id=np.arange(5000), timestamp=np.arange(5000))
    damaged = bytearray((tmp_path / "log").read_bytes())
    damaged[20:400] = b"x" * 380
    (tmp_path / "log").write_bytes(damaged)
    with pytest.raises(InputError, match=r"Spark gave up: \[FAILED_READ_FILE.* reading file file:.*/log"):
        run(tmp_path / "log", tmp_path / "out", "spark")
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.skipif(not HAS_PYSPARK, reason="engine=spark needs pyspark")
def test_without_java(tmp_path, monkeypatch):
    from pyspark.sql import SparkSession

    monkeypatch.setattr(SparkSession, "getActiveSession", classmethod(lambda cls: None))  # another test's
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    write_log(tmp_path / "log", user_id=[1], item_id=[2], timestamp=[3])
    with pytest.raises(InputError, match="engine=spark needs Java 17 or later, and there is no java in PATH"):
        run(tmp_path / "log", tmp_path / "out", "spark")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(InputError, match="no java in JAVA_HOME"):
        run(tmp_path / "log", tmp_path / "out", "spark")


def test_without_pyspark(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    write_log(tmp_path / "log", user_id=[1], item_id=[2], timestamp=[3])
    with pytest.raises(InputError, match="engine=spark needs pyspark, which is not installed"):
        run(tmp_path / "log", tmp_path / "out", "spark")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "pandas"}, "engine is 'pandas'; it must be one of duckdb, spark"),
        ({"engine": "spark", "memory_limit": "8GB"}, "threads and memory_limit are DuckDB's"),
        ({"engine": "spark", "threads": 2}, "threads and memory_limit are DuckDB's"),
        ({"spark": SparkConfig(master="yarn")}, "but the engine is duckdb"),
    ],
)
def test_engines_have_settings_of_their_own(change, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig("log", "out", **change)


@needs_spark
def test_a_session_that_is_there_takes_no_other_settings(tmp_path, spark_session):
    write_log(tmp_path / "log", user_id=[1], item_id=[2], timestamp=[3])
    with pytest.raises(InputError, match=r"has a Spark session already \(local\[2\]\), so spark.master and spark.conf"):
        run(tmp_path / "log", tmp_path / "out", "spark", spark=SparkConfig(master="yarn"))


def test_settings_from_the_command_line():
    overrides = ["engine=spark", "spark.master='local[8]'", "spark.conf=['spark.driver.memory=8g','spark.x.y=a,b']"]
    config = compose("prepare", PrepareConfig, ["input=log", "output=out", *overrides])
    assert config.spark == SparkConfig("local[8]", ["spark.driver.memory=8g", "spark.x.y=a,b"])


def test_conf_is_name_and_value():
    with pytest.raises(InputError, match=r"spark.conf holds 'driver.memory'; it must be like 'spark.driver.memory=16g'"):
        SparkConfig(conf=["driver.memory"])
