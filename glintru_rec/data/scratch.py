"""A DuckDB database for the time of one job."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb


@contextmanager
def scratch_database(folder: Path, threads: int = 0, memory_limit: str = "") -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database that sorts and groups out of core, in ``folder``, which is gone afterwards.

    Args:
        folder: to make.
        threads: of DuckDB; 0 for one per core.
        memory_limit: memory it may use before it spills to the folder, such as ``8GB``; empty for most of the machine's.
    """
    folder.mkdir()
    with duckdb.connect(str(folder / "log.duckdb")) as db:
        db.execute("SET temp_directory = $folder", {"folder": str(folder / "spill")})
        db.execute("SET preserve_insertion_order = true; SET enable_progress_bar = false; SET TimeZone = 'UTC'")
        if threads:
            db.execute(f"SET threads = {threads}")
        if memory_limit:
            db.execute(f"SET memory_limit = '{memory_limit}'")
        yield db
    shutil.rmtree(folder)
