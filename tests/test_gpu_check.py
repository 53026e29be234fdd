"""tools/gpu_check.py where there is no GPU: it says so, its parts fail one by one, and its training loop runs."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY, environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tools/gpu_check.py")

TOOLS = str(REPOSITORY / "tools")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import gpu_check
    import gpu_check_parts

    return gpu_check, gpu_check_parts


def test_it_says_that_there_is_no_gpu():
    command = [sys.executable, f"{TOOLS}/gpu_check.py"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
    assert (result.returncode, result.stdout) == (2, "")
    assert "no GPU here" in result.stderr
    assert "exit status 2" in result.stderr


def test_a_part_that_fails_is_reported(tools):
    gpu_check, _ = tools
    verdict, printed = gpu_check.run_part("sharded", "", 120)
    assert verdict == "failed: exit status 1"
    assert "CUDA" in printed
    assert gpu_check.run_part("sharded", "", 0.01)[0].startswith("failed: not done after")


def test_parts_without_time_left_are_reported(tools):
    gpu_check, parts = tools
    verdicts, _ = gpu_check.check("", minutes=0)
    assert [name for name, _, _ in verdicts] == list(parts.PARTS)
    assert all("left, it needs" in verdict for _, verdict, _ in verdicts)
    assert sum(part.at_least for part in parts.PARTS.values()) < 9 * 60


def test_its_training_loop_trains(tools):
    _, parts = tools
    items, offsets = parts.random_sequences(60, 500, 10)
    assert items.max() < 500
    assert np.diff(offsets).min() >= 3
    small = ["model.embedding_dim=16", "model.options.num_heads=2", "data.max_seq_len=20", "trainer.batch_targets=64"]
    with parts.training((items, offsets), 500, ["table=row_wise", *small], device="cpu") as run:
        run.steps(3)
        assert run.trainer.state.step == 3
        assert 0 < run.loss() < 20
