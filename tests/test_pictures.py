"""The tools that draw: what they show, the same file for the same figures, clear errors."""

import json
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from glintru_rec.errors import InputError
from tests.conftest import REPOSITORY, environment

flow, curves, cost = (run_path(str(REPOSITORY / "tools" / f"draw_{name}.py")) for name in ("flow", "curves", "cost"))


def test_flow_is_what_the_pages_show(tmp_path):
    """The committed pictures are those that the tool draws."""
    flow["main"](tmp_path)
    for name in ("programs", "model"):
        drawn, committed = (folder / f"{name}.svg" for folder in (tmp_path, REPOSITORY / "docs" / "pictures"))
        assert drawn.read_text().count("<path") == committed.read_text().count("<path"), f"run tools/draw_flow.py: {name}"


def test_curves_of_a_run(run_dir, tmp_path):
    train, valid = curves["read_curves"](run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert train == [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    assert [epoch for epoch, _ in valid] == [1, 2, 3, 4]
    for name in ("a.svg", "b.svg"):
        curves["draw"]({"one run": run_dir}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(InputError, match=r"it has no metrics\.jsonl"):
        curves["read_curves"](tmp_path)


def test_cost_of_a_search(tmp_path):
    values = [{"loss.num_negatives": str(2**n)} for n in (2, 5, 9)]
    trials = [{"values": value, "value": n / 10, "finished": {"train_seconds": 5.0 * n}} for n, value in enumerate(values, 1)]
    sweep = {"metric": "valid_ndcg@10", "trials": trials}
    assert [cost["cost_of"](trial, "loss.num_negatives") for trial in trials] == [4.0, 32.0, 512.0]
    assert [cost["cost_of"](trial, "train_seconds") for trial in trials] == [5.0, 10.0, 15.0]
    cost["draw"](sweep, "loss.num_negatives", tmp_path / "cost.svg")
    assert "</svg>" in (tmp_path / "cost.svg").read_text()
    with pytest.raises(InputError, match="cost is 'model', which is None"):
        cost["cost_of"](trials[0], "model")
    with pytest.raises(InputError, match="no trial that ended"):
        cost["draw"]({**sweep, "trials": []}, "train_seconds", tmp_path / "none.svg")


@pytest.mark.parametrize(("tool", "arguments"), [("curves", ["nowhere"]), ("cost", ["nowhere", "cost=x"])])
def test_wrong_folder_is_one_line(tool, arguments, tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / f"draw_{tool}.py"), *arguments, f"output={tmp_path / 'x.svg'}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: nowhere is no")
    assert not Path(tmp_path / "x.svg").exists()
