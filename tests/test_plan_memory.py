"""tools/plan_memory.py: what it computes against a run's own plan, and its total against what a process really takes."""

import json
import re
import subprocess
import sys
from runpy import run_path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glintru_rec.config import from_yaml
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.errors import InputError
from glintru_rec.training.config import TrainConfig
from tests.conftest import REPOSITORY, environment, make_log

TOOL = REPOSITORY / "tools" / "plan_memory.py"
planner = run_path(str(TOOL))
plan, held_by_table, peak = planner["plan"], planner["held_by_table"], planner["peak"]


def held(*arguments: str):
    num_items, config, ranks, _, _ = plan(list(arguments))
    return held_by_table(config, num_items, ranks)


def test_bytes_are_those_of_a_runs_plan(run_dir):
    config = from_yaml(run_dir / "config.yaml", TrainConfig)
    said = json.loads((run_dir / "plan.json").read_text())
    computed = held_by_table(config, said["num_items"], said["num_ranks"])
    assert [computed.table + computed.optimizer] == said["bytes_per_rank"]


def test_bytes_by_hand():
    rows = held("num_items=1000000", "dim=64", "ranks=3")
    assert (rows.table, rows.optimizer, rows.gradient) == (333_334 * 64 * 4, 333_334 * 4, 0)
    assert rows.checkpoint == rows.table + rows.optimizer
    assert held("num_items=1000000", "dim=64", "trainer.checkpoint_in_background=false").checkpoint == 0
    columns = held("num_items=1000", "dim=64", "ranks=4", "sharding=column_wise")
    assert (columns.table, columns.optimizer) == (1000 * 16 * 4, 1000 * 16 * 4)  # adagrad: a number for each
    half = held("num_items=1000", "dim=64", "dtype=fp16", "sharding=table_wise", "ranks=8", "optimizer=sgd")
    assert (half.table, half.optimizer) == (1000 * 64 * 2, 0)
    copied = held("num_items=2000", "dim=64", "ranks=8", "sharding=replicated", "optimizer.ema_decay=0.9")
    weights = 2000 * 64 * 4
    assert (copied.table, copied.optimizer, copied.gradient, copied.average) == (weights, 2 * weights, weights, weights)
    assert copied.checkpoint == 4 * weights
    process = planner["Process"](libraries=1, step=10**10, encoding=0, dense=10)
    assert peak(copied, process) == 1 + 5 * weights + 10**10 + 2 * weights + (4 * weights + 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dim=64"], "give num_items="),
        (["num_items=many"], "num_items is 'many'; it must be a number"),
        (["num_items=10", "ranks=0.5"], "ranks is '0.5'; it must be a whole number from 1 on"),
        (["num_items=10", "nonsense=1"], "nonsense"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plan(arguments)
    with pytest.raises(InputError, match="name the one that you expect"):
        held("num_items=10", "sharding=auto")
    with pytest.raises(InputError, match="num_items is 10; with a dynamic vocabulary, give the rows of the table"):
        held("num_items=10", "data.vocabulary=dynamic", "vocabulary.capacity=8")


# The program, which at its end says the most memory that it has held, on a disk so slow that a checkpoint is written only once
# training waits for it: its copy lies beside all that follows.
MEASURED = """
import atexit, runpy, threading
import torch
from glintru_rec.training.checkpoint_writer import CheckpointWriter
from glintru_rec.training.summary import peak_memory

write, wait, waited_for = CheckpointWriter._write, CheckpointWriter.wait, threading.Event()

def write_late(writer, *parts):
    waited_for.wait()
    waited_for.clear()
    write(writer, *parts)

def wait_for_late(writer):
    if writer.thread is not None:
        waited_for.set()
    wait(writer)

CheckpointWriter._write, CheckpointWriter.wait = write_late, wait_for_late
atexit.register(lambda: print("peak", peak_memory(torch.device("cpu"))["peak_memory_bytes"]))
runpy.run_module("launch.train", run_name="__main__")
"""


@pytest.mark.programs
def test_total_is_what_a_training_takes(tmp_path):
    """260,000 items of 512 numbers: the table and the copy of it that is saved outweigh everything else."""
    num_items = 260_000
    log = make_log()
    rest = pa.table({"user_id": range(10**6, 10**6 + num_items), "item_id": range(num_items), "timestamp": [0] * num_items})
    pq.write_table(pa.concat_tables([log, rest]), tmp_path / "log.parquet")
    small = {"min_user_events": 1, "min_item_events": 1}
    prepare(PrepareConfig(str(tmp_path / "log.parquet"), str(tmp_path / "dataset"), **small), progress=lambda _: None)
    few = ["data.max_seq_len=20", "trainer.batch_targets=128", "trainer.eval_batch_users=32"]
    wide = ["model.embedding_dim=512", *few]

    def run(*command: str) -> str:
        result = subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment()
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    where = [f"data.path={tmp_path / 'dataset'}", f"output={tmp_path / 'run'}"]
    trained = run("-c", MEASURED, *where, *wide, "trainer.max_steps=3", "trainer.checkpoint_every_steps=2")
    measured = int(re.search(r"^peak (\d+)$", trained, re.MULTILINE)[1])
    printed = run(str(TOOL), f"num_items={num_items}", "history=19", *wide)
    planned = int(re.search(r"peak of each rank +│ +([\d,]+)", printed)[1].replace(",", "")) * 2**20
    assert planned == pytest.approx(measured, rel=0.1)
    (table,) = json.loads((tmp_path / "run/plan.json").read_text())["bytes_per_rank"]
    assert 2 * table > measured / 2
