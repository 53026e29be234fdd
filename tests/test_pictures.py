"""The tools that draw: what they show, the same file for the same figures, clear errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glintru_rec.errors import InputError
from tests.conftest import REPOSITORY, environment

sys.path.append(str(REPOSITORY / "tools"))
import draw_cost
import draw_curves
import draw_flow
import drawing


def test_flow_is_what_the_pages_show(tmp_path):
    """The committed pictures are those that the tool draws."""
    draw_flow.main(tmp_path)
    for name in ("programs", "model"):
        drawn, committed = (folder / f"{name}.svg" for folder in (tmp_path, REPOSITORY / "docs" / "pictures"))
        assert drawn.read_text().count("<path") == committed.read_text().count("<path"), f"run tools/draw_flow.py: {name}"


def test_curves_of_a_run(run_dir, tmp_path):
    train, valid = draw_curves.read_curves(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert train == [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    assert [epoch for epoch, _ in valid] == [1, 2, 3, 4]
    for name in ("a.svg", "b.svg"):
        drawing.save(draw_curves.draw({"one run": run_dir}), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(InputError, match=r"it has no metrics\.jsonl"):
        draw_curves.read_curves(tmp_path)


def test_cost_of_a_search(tmp_path):
    values = [{"loss.num_negatives": str(2**n)} for n in (2, 5, 9)]
    trials = [{"values": value, "value": n / 10, "finished": {"train_seconds": 5.0 * n}} for n, value in enumerate(values, 1)]
    sweep = {"metric": "valid_ndcg@10", "trials": trials}
    assert [draw_cost.cost_of(trial, "loss.num_negatives") for trial in trials] == [4.0, 32.0, 512.0]
    assert [draw_cost.cost_of(trial, "train_seconds") for trial in trials] == [5.0, 10.0, 15.0]
    drawing.save(draw_cost.draw(sweep, "loss.num_negatives"), tmp_path / "cost.svg")
    assert "</svg>" in (tmp_path / "cost.svg").read_text()
    with pytest.raises(InputError, match="cost is 'model', which is None"):
        draw_cost.cost_of(trials[0], "model")
    with pytest.raises(InputError, match="no trial that ended"):
        draw_cost.draw({**sweep, "trials": []}, "train_seconds")


@pytest.mark.parametrize(("tool", "arguments"), [("curves", ["nowhere"]), ("cost", ["nowhere", "cost=x"])])
def test_wrong_folder_is_one_line(tool, arguments, tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / f"draw_{tool}.py"), *arguments, f"output={tmp_path / 'x.svg'}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: nowhere is no")
    assert not Path(tmp_path / "x.svg").exists()


def test_command_line(monkeypatch, run_dir, tmp_path, capsys):
    def called(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["draw", *arguments])
        return drawing.run("how it is called", draw_curves.main)

    assert called(f"my run={run_dir}", str(run_dir), f"output={tmp_path / 'two.svg'}") == 0
    assert "<svg" in (tmp_path / "two.svg").read_text()
    assert called(str(run_dir)) == called("output=x.svg") == called("--help", "output=x.svg") == 2
    assert capsys.readouterr().out == "how it is called\n" * 3
    monkeypatch.setattr(sys, "argv", ["draw", "one", "two", "cost=x", "output=x.svg"])
    assert drawing.run("", draw_cost.main, "cost") == 2
    assert "one file or folder can be drawn, not one, two" in capsys.readouterr().err
