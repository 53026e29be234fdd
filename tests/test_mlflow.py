"""Figures of runs in MLflow: a real SQLite store, resumed, broken, missing."""

import json
import sqlite3
import subprocess
import sys

import pytest

from glintru_rec.config import compose
from glintru_rec.errors import InputError
from glintru_rec.programs.train import train
from glintru_rec.programs.train_ranking import train_ranking
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.training.config import LoggingConfig, TrainConfig
from glintru_rec.training.mlflow_log import MlflowLog, flatten
from glintru_rec.training.run_log import RunLog
from tests.conftest import REPOSITORY, environment

mlflow = pytest.importorskip("mlflow")  # the extra mlflow; CI has it


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def config_of(uri: str) -> TrainConfig:
    return TrainConfig("somewhere", logging=LoggingConfig(uri, "test", "a run"))


def test_records_of_a_run_and_of_what_goes_on_with_it(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = RunLog(run_dir, config=config_of(uri))
    log.write("train", 10, 0, loss=2.5, rank_seconds=[1.0, 3.0])
    log.close()
    log = RunLog(run_dir, 10, config=config_of(uri))
    log.write("train", 20, 0, loss=1.5, rank_seconds=[1.0, 3.0])
    log.write("valid", 20, 1, **{"ndcg@10": 0.25})
    log.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (10, 2.5),
        (20, 1.5),
    ]
    assert run.data.metrics["train/rank_seconds/1"] == 3.0
    assert run.data.metrics["valid/ndcg_at_10"] == 0.25
    assert run.data.params["loss.num_negatives"] == "1024"
    assert run.data.params["model.options"] == "{}"

    # The store breaks: training goes on, and the other logs have everything.
    log = RunLog(run_dir, 20, 20, config=config_of(uri))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE latest_metrics")
    log.write("train", 30, 1, loss=1.0)
    log.close()
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [10, 20, 20, 30]


def test_failure_is_said_once(tmp_path, capsys):
    log = MlflowLog(tmp_path, LoggingConfig(f"sqlite:///{tmp_path / 'mlflow.db'}"), {})
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE latest_metrics")
    log.write({"loss": 1.0}, 1)
    log.write({"loss": 2.0}, 2)
    log.close()
    assert capsys.readouterr().err.count("MLflow gets no more records") == 1


def test_nested_config_is_listed():
    assert list(flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}})) == [("a.b", 1), ("a.c.d", [2]), ("e", {})]


@pytest.mark.parametrize("uri", ["nonsense://host", "sqlite:////proc/nowhere/mlflow.db"])
def test_store_that_cannot_be_used_is_refused(tmp_path, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=f"logging.mlflow={uri} cannot be used"):
        MlflowLog(tmp_path, LoggingConfig(uri), {})
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_a_run_with_a_store_that_cannot_be_used_leaves_no_trace(task, dataset_dir, ranking_data, tmp_path):
    data = dataset_dir if task == "retrieval" else ranking_data
    overrides = [f"data.path={data}", f"output={tmp_path / 'run'}", "logging.mlflow=nonsense://host"]
    if task == "retrieval":
        program, config = train, compose("train", TrainConfig, overrides)
    else:
        program, config = train_ranking, compose("train_ranking", RankingConfig, ["task=ranking", *overrides])
    with pytest.raises(InputError, match=r"logging\.mlflow=nonsense://host cannot be used"):
        program(config)
    assert not (tmp_path / "run").exists()


# As where it is not installed: the finders that would find it do not see it.
WITHOUT = """
import importlib.machinery, runpy, sys

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "mlflow" else find(name, *rest)
runpy.run_module("launch.train", run_name="__main__")
"""


@pytest.mark.programs
def test_program_says_what_is_missing(tmp_path):
    """What it writes where MLflow is installed, tests/test_docs.py looks at."""
    overrides = [f"data.path={tmp_path}", f"output={tmp_path / 'run'}", "logging.mlflow=sqlite:///m.db"]
    command = [sys.executable, "-c", WITHOUT, *overrides]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
    assert result.returncode == 2
    assert "needs MLflow: pip install 'glintru_rec[mlflow]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
