"""The main job, end to end, by the commands that a user types."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glintru_rec.data.dataset import SequenceDataset
from tests.conftest import REPOSITORY, SMALL, environment, run_program

pytestmark = pytest.mark.programs


def torchx(program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``torchx run launch/<program>.py …`` as typed in the repository's root."""
    command = ["torchx", "run", f"launch/{program}.py", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


@pytest.fixture(scope="module")
def job(log_file, tmp_path_factory) -> Path:
    """Everything from the log to scores, each step a TorchX job; training on two gloo ranks."""
    folder = tmp_path_factory.mktemp("job")
    torchx("prepare", f"input={log_file}", f"output={folder / 'dataset'}")
    torchx(
        "train", "--nproc", "2", f"data.path={folder / 'dataset'}", f"output={folder / 'run'}", *SMALL, "trainer.max_epochs=3"
    )
    evaluation = f"output={folder / 'evaluation.json'}"
    torchx("evaluate", f"checkpoint={folder / 'run'}", f"data.path={folder / 'dataset'}", "split=test", evaluation)
    torchx("export", f"checkpoint={folder / 'run'}", f"output={folder / 'artifact'}")
    SequenceDataset.open(folder / "dataset").write_histories(folder / "histories.parquet", "test")
    score = [f"artifact={folder / 'artifact'}", f"input={folder / 'histories.parquet'}"]
    torchx("score", *score, f"output={folder / 'scores'}", "mode=top_k", "top_k=20")
    return folder


def test_scored_lists_give_the_figures_of_evaluate(job):
    """An independent metric over the ranked lists: dictionaries and math.log2, nothing of ours."""
    targets = {row["user_id"]: row for row in pq.read_table(job / "histories.parquet").to_pylist()}
    hits, gain, reciprocal = 0, 0.0, 0.0
    rows = pq.read_table(sorted((job / "scores").glob("*.parquet"))).to_pylist()
    assert {row["user_id"] for row in rows} == set(targets)
    for row in rows:
        user = targets[row["user_id"]]
        assert not set(row["item_ids"]) & set(user["history"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        if user["target"] in row["item_ids"][:10]:
            place = row["item_ids"].index(user["target"]) + 1
            hits, gain, reciprocal = hits + 1, gain + 1 / math.log2(place + 1), reciprocal + 1 / place
    evaluation = json.loads((job / "evaluation.json").read_text())
    assert evaluation["protocol"]["num_users"] == len(targets)
    for name, total in {"hr@10": hits, "recall@10": hits, "ndcg@10": gain, "mrr@10": reciprocal}.items():
        assert evaluation["metrics"][name] == pytest.approx(total / len(targets), abs=1e-6)
    assert evaluation["metrics"]["hr@10"] > 0.3


def test_protocol_stands_beside_the_figures(job):
    protocol = json.loads((job / "evaluation.json").read_text())["protocol"]
    assert protocol["candidates"] == "full"
    assert protocol["exclude_seen"] is True
    assert protocol["tie_policy"] == "half"
    assert protocol["split"] == "test"


@pytest.mark.parametrize("candidates", ["uniform:20", "popularity:20"])
def test_sampled_protocols(job, tmp_path, candidates):
    """Easier than the whole catalog, equal on one and two ranks, and repeatable."""
    common = [f"checkpoint={job / 'run'}", f"data.path={job / 'dataset'}", f"candidates={candidates}", "split=test"]
    common += ["exclude_seen=false"]  # short of items: histories hold up to 40 of the 60
    run_program("evaluate", *common, f"output={tmp_path / 'one.json'}")
    run_program("evaluate", *common, f"output={tmp_path / 'two.json'}", "batch_users=50", nproc=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-9)
    assert one["protocol"]["candidates"] == candidates
    full = json.loads((job / "evaluation.json").read_text())
    assert one["metrics"]["ndcg@10"] > full["metrics"]["ndcg@10"]


def test_full_evaluation_does_not_depend_on_ranks_or_batches(job, tmp_path):
    common = [f"checkpoint={job / 'run'}", f"data.path={job / 'dataset'}", "split=test"]
    run_program("evaluate", *common, f"output={tmp_path / 'two.json'}", "batch_users=37", nproc=2)
    evaluation, two = json.loads((job / "evaluation.json").read_text()), json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == pytest.approx(evaluation["metrics"], abs=1e-9)


def test_seen_items_can_be_kept(job, tmp_path):
    common = [f"checkpoint={job / 'run'}", f"data.path={job / 'dataset'}", "split=test", "exclude_seen=false"]
    run_program("evaluate", *common, f"output={tmp_path / 'kept.json'}")
    kept = json.loads((tmp_path / "kept.json").read_text())
    cases = SequenceDataset.open(job / "dataset").eval_cases("test")
    histories = np.split(cases.history_items, cases.history_offsets[1:-1])
    repeats = sum(target in history for target, history in zip(cases.targets, histories))
    assert kept["protocol"]["num_targets_seen"] == repeats > 0
    assert kept["metrics"]["mrr"] != json.loads((job / "evaluation.json").read_text())["metrics"]["mrr"]


def test_candidates_and_encode(job, tmp_path):
    histories = pq.read_table(job / "histories.parquet")
    items = pq.read_table(job / "dataset/vocabulary/items.parquet").column("item_id").to_pylist()
    lists = [items[: 1 + row % 5] for row in range(len(histories))]
    pq.write_table(histories.append_column("candidates", pa.array(lists)), tmp_path / "input.parquet")
    common = [f"artifact={job / 'artifact'}", f"input={tmp_path / 'input.parquet'}"]
    run_program("score", *common, f"output={tmp_path / 'candidates'}", "mode=candidates")
    run_program("score", *common, f"output={tmp_path / 'encode'}", "mode=encode")
    run_program("score", *common, f"output={tmp_path / 'all'}", "mode=top_k", "top_k=1000000000")  # as many as there are
    rows = pq.read_table(sorted((tmp_path / "candidates").glob("*.parquet"))).to_pylist()
    assert [row["item_ids"] for row in rows] == lists
    vectors = pq.read_table(sorted((tmp_path / "encode").glob("*.parquet"))).column("embedding").to_pylist()
    assert np.asarray(vectors).shape == (len(histories), 16)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("prepare", ["input=/nowhere/*.parquet", "output={tmp}/out"], "/nowhere"),
        ("train", ["data.path={tmp}", "output={tmp}/out"], "manifest.json"),
        ("evaluate", ["checkpoint={tmp}", "data.path={job}/dataset", "output={tmp}/out"], "not a run directory"),
        ("evaluate", ["checkpoint={job}/run", "data.path={job}/dataset", "output={tmp}/out", "split=all"], "split is 'all'"),
        ("evaluate", ["checkpoint={job}/run", "data.path={job}/dataset", "output={tmp}/out", "candidates=best:9"], "best:9"),
        ("export", ["checkpoint={tmp}", "output={tmp}/out"], "not a run directory"),
        ("export", ["checkpoint={job}/run", "output={job}/artifact"], "not an empty folder"),
        ("score", ["artifact={tmp}", "input={job}/histories.parquet", "output={tmp}/out", "mode=top_k"], "manifest.json"),
        ("score", ["artifact={job}/artifact", "input={job}/histories.parquet", "output={tmp}/out", "mode=best"], "mode"),
        ("score", ["artifact={job}/artifact", "input={tmp}/no.parquet", "output={tmp}/out", "mode=top_k"], "no.parquet"),
        ("score", ["artifact={job}/artifact", "input={job}/histories.parquet", "output={tmp}/out", "mode=encode", "a=1"], "a"),
    ],
)
def test_bad_input_is_one_clear_message(job, tmp_path, program, arguments, message):
    result = run_program(program, *(argument.format(tmp=tmp_path, job=job) for argument in arguments), check=False)
    assert result.returncode == 2, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ") and message in line]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_another_vocabulary(job, tmp_path):
    from glintru_rec.data.prepare import PrepareConfig, prepare
    from tests.conftest import make_log

    pq.write_table(make_log(num_items=50), tmp_path / "other.parquet")
    prepare(PrepareConfig(str(tmp_path / "other.parquet"), str(tmp_path / "other")))
    common = [f"checkpoint={job / 'run'}", f"data.path={tmp_path / 'other'}", f"output={tmp_path / 'evaluation.json'}"]
    result = run_program("evaluate", *common, check=False)
    assert result.returncode == 2
    assert "another vocabulary" in result.stderr
    assert not (tmp_path / "evaluation.json").exists()


def test_torchx_reports_failure(tmp_path):
    result = torchx("train", f"data.path={tmp_path}", f"output={tmp_path / 'run'}", check=False)
    assert result.returncode != 0
    assert "error: " in result.stdout + result.stderr
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("program", ["prepare", "train", "evaluate", "export", "score"])
def test_torchx_help(program):
    result = torchx(program, "--help")
    assert "output=" in result.stdout + result.stderr


@pytest.mark.parametrize("model", ["rec_grela", "lru_rec", "sasrec", "glint_ru_light", "glint_ru_published", "glint_lru"])
def test_every_model_trains_exports_and_scores(job, tmp_path, model):
    """The same programs take every encoder; the artifact ranks as the trained model does.

    On two ranks with three batches: in the last step one rank has nothing to train on.
    """
    items, offsets = SequenceDataset.open(job / "dataset").train_sequences()
    num_sequences = len(offsets) - 1
    num_targets = num_sequences if model == "glint_ru_published" else len(items) - num_sequences
    small = [
        "model.embedding_dim=16",
        "data.max_seq_len=20",
        "trainer.max_epochs=1",
        f"trainer.batch_targets={num_targets * 2 // 5}",
    ]
    run_program("train", f"data.path={job / 'dataset'}", f"output={tmp_path / 'run'}", f"model={model}", *small, nproc=2)
    assert json.loads((tmp_path / "run/finished.json").read_text())["steps"] == 2
    run_program("export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'artifact'}")
    score = [f"artifact={tmp_path / 'artifact'}", f"input={job / 'histories.parquet'}", "mode=top_k", "top_k=10"]
    run_program("score", *score, f"output={tmp_path / 'scores'}")
    evaluation = [f"checkpoint={tmp_path / 'run'}", f"data.path={job / 'dataset'}", f"output={tmp_path / 'evaluation.json'}"]
    run_program("evaluate", *evaluation)
    rows = pq.read_table(sorted((tmp_path / "scores").glob("*.parquet"))).to_pylist()
    targets = pq.read_table(job / "histories.parquet").column("target").to_pylist()
    hits = sum(target in row["item_ids"] for target, row in zip(targets, rows))
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics["hr@10"] == pytest.approx(hits / len(targets), abs=1e-6)
