"""tools/leaderboard.py: the maths of its table, and small leaderboards run for real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

import pytest
import yaml

from glintru_rec.config import compose
from glintru_rec.training.config import TrainConfig
from tests.conftest import REPOSITORY, environment

TOOL = REPOSITORY / "tools" / "leaderboard.py"
table = run_path(str(REPOSITORY / "tools" / "leaderboard_table.py"))
over_seeds, build_row, to_markdown, draw = (table[name] for name in ("over_seeds", "build_row", "to_markdown", "draw"))

ENTRY = {"name": "ours", "group": "", "note": "", "overrides": []}


def run_of(seed: int, ndcg: float, entry: str = "ours", **training) -> dict:
    """What result.json holds of one pair."""
    return {
        "entry": entry,
        "seed": seed,
        "metrics": {"hr@10": 2 * ndcg, "ndcg@10": ndcg},
        "training": {"valid_ndcg@10": ndcg, "best_epoch": 3, "train_seconds": 60.0, "targets_per_second": 1e4, **training},
        "protocol": {
            "candidates": "full",
            "exclude_seen": True,
            "ks": [10],
            "split": "test",
            "seed": None,
            "max_seq_len": 50,
        },
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "threads": 2, "jobs": 1},
        "versions": {"torch": "2.13.0", "commit": "abc"},
    }


def board_of(runs: list[dict], published=(), entries=(ENTRY,), missing=()) -> dict:
    rows = [build_row(entry, [run for run in runs if run["entry"] == entry["name"]]) for entry in entries]
    dataset = {"path": "d", "num_users": 1000, "num_items": 20, "num_events": 30}
    return {
        "title": "T",
        "dataset": dataset,
        "overrides": [],
        "rows": rows,
        "published": list(published),
        "missing": list(missing),
        "runs": runs,
    }


def test_mean_and_deviation_by_hand():
    figure = over_seeds([0.1, 0.2, 0.6])
    assert figure.mean == pytest.approx(0.3)
    assert figure.std == pytest.approx(((0.2**2 + 0.1**2 + 0.3**2) / 2) ** 0.5)  # n - 1
    assert figure.n == 3
    assert over_seeds([0.25]) == (0.25, None, 1)
    assert over_seeds([None, 0.25]) == (0.25, None, 1)
    assert over_seeds([None]) is None
    assert over_seeds([]) is None


def test_markdown_of_several_seeds():
    size = {"encoder": 22016, "table": 774464}
    runs = [
        run_of(0, 0.05, num_parameters=size, peak_memory_bytes=500_000_000),
        run_of(1, 0.06, num_parameters=size, peak_memory_bytes=700_000_000),
    ]
    anchor = {"name": "Theirs", "figures": {"ndcg@10": 0.061}, "source": "table 2 of a paper."}
    text = to_markdown(board_of(runs, [anchor], missing=["ours, seed 2"]))
    assert "| ours | .1100 ± .0141 | .0550 ± .0071 | 2 | .0550 ± .0071 | 22,016 + 774,464 | 3 | 1.00 | 10,000 | 700 |" in text
    assert "| Theirs, published |  | .0610 |" in text
    assert "* Theirs, published: table 2 of a paper." in text
    assert "* ours, seed 2 is missing." in text
    assert "whole catalog; seen items left out; a tie counts half a place. Histories of at most 50 items." in text
    assert "a processor, 2 cores, threads per training: 2; torch 2.13.0; commit abc" in text
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_one_seed_has_no_deviation():
    text = to_markdown(board_of([run_of(0, 0.05)]))
    assert "| ours | .1000 | .0500 | 1 | .0500 |" in text
    assert "±" not in text.partition("| model |")[2]


def test_conditions_that_differ_are_all_named():
    other = run_of(1, 0.05)
    other["versions"] = {"torch": "2.13.0", "commit": "def"}
    assert "torch 2.13.0; commit abc / def." in to_markdown(board_of([run_of(0, 0.05), other]))


def test_table_before_any_run():
    assert "| ours |  |  | 0 |" in to_markdown(board_of([]))


def test_plot_names_every_mark(tmp_path):
    """The same figures give the same file, and close marks keep their names."""
    entries = [{**ENTRY, "name": f"model {index}"} for index in range(4)]
    runs = [run_of(seed, 0.05, entry["name"]) for entry in entries for seed in (0, 1)]
    anchor = {"name": "Theirs", "figures": {"ndcg@10": 0.061}, "source": "s"}
    for name in ("a.svg", "b.svg"):
        draw(board_of(runs, [anchor], entries), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("model 0", "model 3", "Theirs, published"))
    assert text == (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize("name", ["beauty", "ml1m", "ablation_beauty", "ablation_ml1m"])
def test_lists_compose(name):
    listed = yaml.safe_load((REPOSITORY / "configs" / "leaderboard" / f"{name}.yaml").read_text())
    assert len({entry["name"] for entry in listed["entries"]}) == len(listed["entries"]) >= 4
    for entry in listed["entries"]:
        overrides = [*listed.get("overrides", []), *entry.get("overrides", [])]
        compose("train", TrainConfig, [*overrides, "data.path=d", "output=o"])
        assert entry.get("init_from", listed["entries"][0]["name"]) in [other["name"] for other in listed["entries"]]
    for anchor in listed.get("published", []):
        assert set(anchor["figures"]) == {"hr@10", "ndcg@10"}
        assert anchor["source"]


# Real programs from here on.

STEPS = ["trainer.max_steps=12", "trainer.batch_targets=128"]
LIST = {
    "title": "Small",
    "seeds": [0, 1],
    "overrides": ["experiment=smoke"],
    "entries": [
        {"name": "GLINT-RU", "overrides": ["model.options.num_heads=2"], "note": "ours."},
        {"name": "SASRec (attention)", "overrides": ["model=sasrec"], "group": "attention"},
    ],
    "published": [{"name": "Theirs", "figures": {"hr@10": 0.5, "ndcg@10": 0.25}, "source": "a paper."}],
}
FOLDERS = ("glint-ru", "sasrec-attention")


def leaderboard(list_file: Path, dataset: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(list_file, dataset, output, *arguments),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def command(list_file: Path, dataset: Path, output: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(TOOL), str(list_file), f"data.path={dataset}", f"output={output}", *STEPS, *arguments]


def write_list(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({**LIST, **changes}))
    return path


def quality(output: Path) -> list[dict]:
    """Everything of the runs but what a clock or a scale measured."""
    measured = ("train_seconds", "targets_per_second", "peak_memory_bytes", "checkpoint_stalled_seconds")
    kept = []
    for run in json.loads((output / "leaderboard.json").read_text())["runs"]:
        training = {name: value for name, value in run["training"].items() if name not in measured}
        keys = ("entry", "seed", "fingerprint", "metrics", "protocol")
        kept.append({**{key: run[key] for key in keys}, "training": training})
    return kept


@pytest.fixture(scope="module")
def done(dataset_dir, tmp_path_factory) -> Path:
    """A whole small leaderboard, two trainings side by side; beside it its list."""
    folder = tmp_path_factory.mktemp("board")
    result = leaderboard(write_list(folder / "list.yaml"), dataset_dir, folder / "out", "jobs=2")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.programs
def test_files_of_a_leaderboard(done):
    board = json.loads((done / "out/leaderboard.json").read_text())
    assert [(run["entry"], run["seed"]) for run in board["runs"]] == [
        ("GLINT-RU", 0),
        ("SASRec (attention)", 0),
        ("GLINT-RU", 1),
        ("SASRec (attention)", 1),
    ]
    assert board["missing"] == []
    for row in board["rows"]:
        runs = [run for run in board["runs"] if run["entry"] == row["name"]]
        values = [run["metrics"]["ndcg@10"] for run in runs]
        assert row["figures"]["ndcg@10"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["figures"]["ndcg@10"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row["num_parameters"]["table"] == 60 * 16
        assert row["figures"]["train_seconds"]["mean"] > 0
        assert row["peak_memory_bytes"] > 10**8
    for run in board["runs"]:
        assert run["training"]["steps"] == 12
        assert run["protocol"]["split"] == "test"
        assert run["machine"]["jobs"] == 2
        assert "experiment=smoke" in run["arguments"]
    text = (done / "out/leaderboard.md").read_text()
    assert "| GLINT-RU |  | ." in text
    assert "| SASRec (attention) | attention | ." in text
    assert "| Theirs, published |  | .5000 | .2500 |" in text
    assert "240 users, 60 items" in text
    assert f"* Every training: `{' '.join(['experiment=smoke', *STEPS])}`." in text
    assert "2 trainings side by side" in text
    assert "</svg>" in (done / "out/leaderboard.svg").read_text()


@pytest.mark.programs
def test_figures_follow_from_the_seeds(done, dataset_dir, tmp_path):
    result = leaderboard(done / "list.yaml", dataset_dir, tmp_path / "again")
    assert result.returncode == 0, result.stdout + result.stderr
    assert quality(tmp_path / "again") == quality(done / "out")
    first, second = (run["metrics"] for run in quality(done / "out") if run["entry"] == "GLINT-RU")
    assert first != second  # seeds do differ


@pytest.mark.programs
def test_second_call_trains_nothing(done, dataset_dir):
    def files() -> dict[str, tuple[int, int]]:
        found = {str(path): path.stat() for path in (done / "out/runs").rglob("*") if path.is_file()}
        return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}

    before, board = files(), (done / "out/leaderboard.json").read_text()
    result = leaderboard(done / "list.yaml", dataset_dir, done / "out", "jobs=2")
    assert result.returncode == 0, result.stderr
    assert "4 of 4 done before" in result.stdout
    assert files() == before
    assert (done / "out/leaderboard.json").read_text() == board


@pytest.mark.programs
def test_changed_override_is_refused(done, dataset_dir, tmp_path):
    entries = [{**LIST["entries"][0], "overrides": ["model.options.num_heads=4"]}, LIST["entries"][1]]
    board = (done / "out/leaderboard.md").read_text()
    result = leaderboard(write_list(tmp_path / "list.yaml", entries=entries), dataset_dir, done / "out")
    assert result.returncode == 2
    assert f"{done / 'out/runs/glint-ru/seed-0'}: model.options.num_heads was 2, now 4" in result.stderr
    assert "sasrec" not in result.stderr
    assert (done / "out/leaderboard.md").read_text() == board


@pytest.mark.programs
def test_failure_is_reported_and_the_rest_runs(dataset_dir, tmp_path):
    """The failing entry comes first; later a table is made of what there is."""
    entries = [
        {"name": "wrong", "overrides": ["++model.options.nonsense=1"]},
        LIST["entries"][1],
        {"name": "on", "init_from": "wrong"},
        {"name": "more", "overrides": ["model=sasrec"], "init_from": "SASRec (attention)"},
    ]
    list_file = write_list(tmp_path / "list.yaml", entries=entries)
    result = leaderboard(list_file, dataset_dir, tmp_path / "out", "seeds=3")
    log = tmp_path / "out/runs/wrong/seed-3/train.log"
    assert result.returncode == 1
    assert re.search(
        r"failed: wrong, seed 3: train failed .*nonsense is not an option.*" + re.escape(f"[{log}]"), result.stderr
    )
    assert "nonsense" in log.read_text()
    board = json.loads((tmp_path / "out/leaderboard.json").read_text())
    assert [(run["entry"], run["seed"]) for run in board["runs"]] == [("SASRec (attention)", 3), ("more", 3)]
    assert board["missing"] == ["wrong, seed 3", "on, seed 3"]
    assert "failed: on, seed 3: wrong, seed 3, which it starts from, failed" in result.stderr
    more = (tmp_path / "out/runs/more/seed-3/run/config.yaml").read_text()
    assert f"init_from: {tmp_path / 'out/runs/sasrec-attention/seed-3/run'}" in more
    (tmp_path / "out/leaderboard.md").unlink()
    result = leaderboard(list_file, dataset_dir, tmp_path / "out", "seeds=3", "--table-only")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "wrong, seed 3 is missing" in text
    assert "±" not in text.partition("| model |")[2]  # one seed


@pytest.mark.programs
def test_killed_leaderboard_goes_on(dataset_dir, tmp_path):
    """Killed with -9, it leaves a training; that one keeps the folder until it ends, and the next call goes on."""
    arguments = [write_list(tmp_path / "list.yaml", entries=LIST["entries"][:1]), dataset_dir, tmp_path / "out", "seeds=0"]
    longer = ["trainer.max_steps=400", "trainer.max_epochs=100", "trainer.checkpoint_every_steps=5", "trainer.patience=0"]
    run_dir = tmp_path / "out/runs/glint-ru/seed-0/run"
    with subprocess.Popen(command(*arguments, *longer), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not list(run_dir.glob("checkpoints/step-*")):
            assert first.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        training = children_of(first.pid)
        for pid in training:
            os.kill(pid, signal.SIGSTOP)
        first.kill()
    result = leaderboard(*arguments, *longer)
    assert result.returncode == 2
    assert "is in use by another leaderboard" in result.stderr
    for pid in training:
        os.kill(pid, signal.SIGKILL)
    assert not (run_dir / "finished.json").exists()
    result = leaderboard(*arguments, *longer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in (run_dir.parent / "train.log").read_text()
    assert json.loads((run_dir / "finished.json").read_text())["steps"] == 400


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.programs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs=0"], "jobs is '0'; it must be a number of at least 1"),
        (["seeds=0,x"], "seeds is '0,x'; it must be integers with commas between them"),
        (["trainer.nonsense=1"], "entry 'GLINT-RU': "),
        (["--table-only"], "does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(dataset_dir, tmp_path, arguments, message):
    result = leaderboard(write_list(tmp_path / "list.yaml"), dataset_dir, tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
