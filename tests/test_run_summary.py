"""What finished.json says of a run, from records written by hand."""

import json
import subprocess
import sys

import pytest

from glintru_rec.training.summary import summarize_records
from tests.conftest import REPOSITORY

GIGABYTE = 10**9


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train(step, seconds, targets):
    return {"kind": "train", "step": step, "epoch": 0, "loss": 1.0, "seconds": seconds, "num_targets": targets}


def test_seconds_and_targets_are_summed_and_the_peak_is_the_highest(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        train(10, 2.0, 1000),
        {"kind": "checkpoint", "step": 15, "epoch": 0, "failed": 1, "stalled_seconds": 0.5, "write_seconds": 9.0},
        train(20, 3.0, 1500),
        {"kind": "valid", "step": 20, "epoch": 1, "ndcg@10": 0.3, "seconds": 50.0, "peak_memory_bytes": 3 * GIGABYTE},
        {"kind": "checkpoint", "step": 20, "epoch": 1, "failed": 0, "stalled_seconds": 0.25, "write_seconds": 9.0},
        train(30, 5.0, 2500),
        {"kind": "valid", "step": 30, "epoch": 2, "ndcg@10": 0.2, "seconds": 50.0, "peak_memory_bytes": GIGABYTE},
    )
    assert summarize_records(path, best_step=20) == {
        "train_seconds": 10.0,  # neither validation's
        "targets_per_second": 500.0,
        "best_epoch": 1,
        "num_checkpoints": 1,
        "num_failed_checkpoints": 1,
        "checkpoint_stalled_seconds": 0.75,
        "peak_memory_bytes": 3 * GIGABYTE,  # a resumed run's second process was smaller
    }


def test_records_of_an_older_version_say_what_they_can(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"kind": "train", "step": 10, "epoch": 0, "loss": 1.0, "targets_per_second": 9.0},
        {"kind": "valid", "step": 10, "epoch": 1, "ndcg@10": 0.3, "seconds": 50.0},
        train(20, 2.0, 1000),
    )
    summary = summarize_records(path, best_step=10)
    assert summary.pop("best_epoch") == 1
    assert set(summary.values()) == {None}


@pytest.mark.programs
@pytest.mark.skipif(sys.platform != "linux", reason="getrusage elsewhere counts the process that forked")
def test_the_peak_is_this_process_own_not_its_parents():
    """The parent holds a gigabyte when it starts the one that is measured."""
    child = (
        "import torch; from glintru_rec.training.summary import peak_memory; "
        "print(peak_memory(torch.device('cpu'))['peak_memory_bytes'])"
    )
    parent = "import subprocess, sys; held = b'x' * 10**9; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    command = [sys.executable, "-c", parent, child]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 10**7 < int(result.stdout) < 9 * 10**8
