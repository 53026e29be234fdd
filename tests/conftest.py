"""A small log whose next item can be learnt, and real programs to run on it."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

# Tests are many small operations and share the cores with the processes that some of them start.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


def make_log(num_users: int = 240, num_items: int = 60, seed: int = 0) -> pa.Table:
    """Histories of 6 to 40 events in which item i is followed by i+1, i+2 or i+3 (mostly), shuffled as logs are."""
    rng = np.random.default_rng(seed)
    users, items, times = [], [], []
    for user in range(num_users):
        length = int(rng.integers(6, 41))
        steps = rng.choice([1, 2, 3, 17], size=length, p=[0.7, 0.15, 0.1, 0.05])
        users.append(np.full(length, 1000 + user))
        items.append(500 + 7 * ((rng.integers(num_items) + np.cumsum(steps)) % num_items))
        times.append(np.arange(length) * 10 + user)
    order = rng.permutation(sum(map(len, users)))
    columns = {"user_id": users, "item_id": items, "timestamp": times}
    return pa.table({name: np.concatenate(parts).astype(np.int64)[order] for name, parts in columns.items()})


def run_program(program: str, *overrides: str, nproc: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``launch/<program>.py`` in a fresh process, or in ``nproc`` gloo ranks."""
    launch = [sys.executable, "-m"]
    if nproc > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"]
    result = subprocess.run(
        [*launch, f"launch.{program}", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


def keys_of(config: Any) -> dict[str, Any]:
    """A config of scoring as its keys and values, less the group index, which is left at its default."""
    return {key: value for key, value in asdict(config).items() if key != "index"}


def environment() -> dict[str, str]:
    """The environment of a user with the virtual environment active; one thread a process, as tests share the cores."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def log_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(make_log(), path)
    return path


@pytest.fixture(scope="session")
def dataset_dir(log_file, tmp_path_factory) -> Path:
    from glintru_rec.data.prepare import PrepareConfig, prepare

    path = tmp_path_factory.mktemp("data") / "dataset"
    prepare(PrepareConfig(str(log_file), str(path)))
    return path


SMALL = ["model.embedding_dim=16", "model.options.num_heads=2", "data.max_seq_len=20", "trainer.batch_targets=128"]


@pytest.fixture(scope="session")
def run_dir(dataset_dir, tmp_path_factory) -> Path:
    """A small run, trained until it has learnt something."""
    path = tmp_path_factory.mktemp("run") / "run"
    run_program(
        "train", f"data.path={dataset_dir}", f"output={path}", *SMALL, "trainer.max_epochs=4", "model.options.dropout=0.1"
    )
    return path


@pytest.fixture(scope="session")
def ranking_data(log_file, tmp_path_factory):
    """Ranking examples of the small log: is the item's number odd? Some tables are large enough to be spread by rows."""
    from glintru_rec.ranking.prepare import PrepareRankingConfig, prepare_ranking

    path = tmp_path_factory.mktemp("ranking") / "dataset"
    prepare_ranking(
        PrepareRankingConfig(
            str(log_file),
            str(path),
            tasks={"odd": "item_id % 2 = 1"},
            sparse={"user": "user_id", "item": "item_id", "event": "1000 * user_id + event_time"},
            dense={"before": "count(*) OVER user_past"},
            sequence={"odd": "item_id % 2", "event": "1000 * user_id + event_time"},
        )
    )
    return path
