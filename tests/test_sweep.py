"""tools/sweep.py: what a command line asks for, real small searches, going on with them."""

import json
import re
import subprocess
import sys

import pytest

from glintru_rec.errors import InputError
from tests.conftest import REPOSITORY, environment

TOOL = REPOSITORY / "tools" / "sweep.py"
SMALL = ["experiment=smoke", "model.options.num_heads=2", "trainer.max_steps=6", "trainer.log_every_steps=3"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import sweep

    return sweep


@pytest.fixture
def search(tool):
    import sweep_search

    return sweep_search


@pytest.fixture
def trials(tool):
    import sweep_trials

    return sweep_trials


def sweep_of(dataset, output, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), f"data.path={dataset}", f"output={output}", *SMALL, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())


def test_grid_in_the_words_of_hydra(tool, search, tmp_path):
    sweep = tool.read_command_line(
        [f"output={tmp_path}", "jobs=2", "a.b=1e-3,3e-3", "model=choice(x,y)", "n=range(1,6,2)", "c=[1,2]"]
    )
    trials = search.grid(sweep)
    assert (sweep.jobs, sweep.fixed, len(trials)) == (2, ["c=[1,2]"], 12)
    assert trials[0].values == {"a.b": "0.001", "model": "x", "n": "1"}
    assert trials[-1].values == {"a.b": "0.003", "model": "y", "n": "5"}
    assert len({trial.folder for trial in trials}) == 12
    assert trials[0].folder.name.startswith("b-0.001_model-x_n-1_")
    other = tool.read_command_line([f"output={tmp_path}", "a.b=1e-3,3e-3", "model=choice(x,y)", "n=range(1,6,2)", "c=[1]"])
    assert not {trial.folder for trial in search.grid(other)} & {trial.folder for trial in trials}


def test_spaces_of_optuna(tool, search):
    parse = tool.OverridesParser.create().parse_overrides
    written = ["a=tag(log,interval(1e-4,1e-2))", "b=int(interval(2,8))", "c=x,y"]
    log, whole, words = (search.distribution_of(each) for each in parse(written))
    assert (log.low, log.high, log.log) == (1e-4, 1e-2, True)
    assert (type(whole).__name__, whole.low, whole.high) == ("IntDistribution", 2, 8)
    assert words.choices == ("x", "y")


def test_median_of_others_decides(tool, search, trials, tmp_path):
    sweep = tool.read_command_line([f"output={tmp_path}", "a=1,2,3,4", "pruner=median"])
    runner = trials.Runner(sweep, lock=-1)
    *others, own = search.grid(sweep)
    (own.folder / "run").mkdir(parents=True)
    log = own.folder / "run" / "metrics.jsonl"

    def is_behind(*values: float) -> bool:
        records = [{"kind": "valid", "step": 9, "epoch": epoch, "ndcg@10": value} for epoch, value in enumerate(values, 1)]
        log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "valid", "ep')
        return runner._is_behind(own)

    runner.curves = {trial.folder: {1: value, 2: 2 * value} for trial, value in zip(others[:2], (0.1, 0.2))}
    assert not is_behind(0.01)  # two others say too little
    runner.curves[others[2].folder] = {1: 0.3, 2: 0.6}
    assert is_behind(0.19)
    assert not is_behind(0.21)
    assert is_behind(0.39, 0.3)  # its best so far counts
    assert not is_behind(0.5, 0.3)
    assert not is_behind(0.1, 0.1, 0.1)  # nobody else had that many epochs


def test_figure_by_name(trials):
    ranking = {"steps": 5, "valid": {"click.auc": 0.75}, "test": {"click.auc": 0.5}}
    assert trials.figure_of({"valid_ndcg@10": 0.25}, "valid_ndcg@10") == 0.25
    assert trials.figure_of(ranking, "valid.click.auc") == 0.75
    with pytest.raises(InputError, match=r"does not have; it has steps, valid\.click\.auc"):
        trials.figure_of(ranking, "valid.auc")


def test_figures_of_another_metric_are_not_taken_for_this_one(tool, search, tmp_path, monkeypatch, capsys):
    arguments = ["data.path=d", f"output={tmp_path}", "trainer.seed=1,2"]
    for trial in search.grid(tool.read_command_line(arguments)):
        trial.folder.mkdir(parents=True)
        result = {"values": trial.values, "status": "done", "metric": "valid_hr@10", "value": 0.5, "curve": {}, "finished": {}}
        (trial.folder / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments, "metric=valid_hr@10"])
    assert tool.main() == 0
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    assert tool.main() == 2
    assert "metric is 'valid_ndcg@10'; it must be 'valid_hr@10', which " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=1,2"], "give output="),
        (["output=x", "a=1"], "at least one key with several values"),
        (["output=x", "a=interval(0,1)"], "or take sampler=tpe"),
        (["output=x", "a=1,2", "jobs=none"], "jobs is 'none'; it must be a whole number"),
        (["output=x", "a=1,2", "sampler=best"], "sampler is 'best'; it must be one of grid, tpe, random"),
    ],
)
def test_bad_input_is_named(tool, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        tool.read_command_line(arguments)


def test_hydras_flag_leads_here(monkeypatch, capsys):
    from glintru_rec.programs.launcher import run
    from glintru_rec.training.config import TrainConfig

    monkeypatch.setattr(sys, "argv", ["train", "--multirun", "trainer.seed=0,1"])
    with pytest.raises(SystemExit, match="2"):
        run("train", TrainConfig, lambda config: None)
    assert "tools/sweep.py" in capsys.readouterr().err


@pytest.mark.programs
def test_searches_fail_by_name_and_go_on(tool, trials, dataset_dir, tmp_path):
    """One value cannot be trained with; the second call trains nothing that has its result."""
    result = sweep_of(dataset_dir, tmp_path / "out", "trainer.batch_targets=128,1")
    assert result.returncode == 1, result.stdout + result.stderr
    said = json.loads((tmp_path / "out/sweep.json").read_text())
    (done,) = said["trials"]
    run_dir = next((tmp_path / "out/trials").glob("batch_targets-128_*")) / "run"
    assert done["value"] == json.loads((run_dir / "finished.json").read_text())["valid_ndcg@10"]
    assert "trainer.batch_targets is 1, less than data.max_seq_len" in said["failures"]["trainer.batch_targets=1"]
    text = (tmp_path / "out/sweep.md").read_text()
    assert f"| 128 | {done['value']:.4f} | done |" in text
    assert "Best on validation: `trainer.batch_targets=128`" in text
    before = (run_dir / "finished.json").stat().st_mtime_ns
    assert sweep_of(dataset_dir, tmp_path / "out", "trainer.batch_targets=128,1").returncode == 1
    assert (run_dir / "finished.json").stat().st_mtime_ns == before

    # A search over an interval learns from the earlier ones with the same other keys, here written by hand.
    pytest.importorskip("optuna")
    space = "optimizer.learning_rate=tag(log,interval(1e-3,1e-2))"
    asked = ["sampler=tpe", "trials=2", space, "trainer.batch_targets=128"]
    fixed = [f"data.path={dataset_dir}", *SMALL, "trainer.batch_targets=128"]
    sweep = tool.read_command_line([f"output={tmp_path / 'out'}", "sampler=tpe", *fixed, space])
    earlier = trials.trial_of(sweep, {"optimizer.learning_rate": "0.002"}).folder
    earlier.mkdir()
    values = {"optimizer.learning_rate": "0.002"}
    (earlier / "values.json").write_text(json.dumps(values))
    made = {"values": values, "status": "stopped early", "value": 0.9, "arguments": [], "curve": {"1": 0.9}, "finished": {}}
    (earlier / "result.json").write_text(json.dumps(made))
    result = sweep_of(dataset_dir, tmp_path / "out", *asked)
    assert result.returncode == 0, result.stdout + result.stderr
    ended = json.loads((tmp_path / "out/sweep.json").read_text())["trials"]
    assert [trial["status"] for trial in ended] == ["stopped early", "done"]
    assert 1e-3 <= float(ended[1]["values"]["optimizer.learning_rate"]) <= 1e-2
