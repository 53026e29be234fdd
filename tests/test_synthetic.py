"""The synthetic log follows the law that it states, and the stated figures are those of the best ranking."""

import json
import math
from collections import Counter
from pathlib import Path
from runpy import run_path

import numpy as np
import pyarrow.parquet as pq
import pytest

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.training.config import TrainConfig
from tests.conftest import REPOSITORY

# A file, not a package: it is run from the repository, and never installed.
TOOL = run_path(str(REPOSITORY / "tools/make_synthetic.py"))
ITEMS, CLUSTERS, USERS, EVENTS, STAY = 120, 4, 300, 50, 0.8
SIZE = ITEMS // CLUSTERS


def make(folder: Path, seed: int = 0) -> dict:
    return TOOL["make_synthetic"](folder, ITEMS, CLUSTERS, USERS, EVENTS, STAY, seed)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    law = make(folder)
    assert json.loads((folder / "law.json").read_text()) == law
    log = pq.read_table(folder / "log.parquet")
    return folder, law, {name: log[name].to_numpy() for name in log.column_names}


def true_law() -> tuple[list[list[float]], list[float]]:
    """P(item | last item's cluster), item by item as the tool's docstring says, and the share of each cluster."""
    popularity = [(k + 1) ** -0.5 for k in range(CLUSTERS)]
    shares = [weight / sum(popularity) for weight in popularity]
    heads = [(j + 1) ** -1.2 for j in range(SIZE)]
    table = []
    for last in range(CLUSTERS):
        row = []
        for k in range(CLUSTERS):
            next_cluster = (STAY if k == last else 0.0) + (1 - STAY) * shares[k]
            row += [next_cluster * head / sum(heads) for head in heads]
        assert sum(row) == pytest.approx(1)
        table.append(row)
    return table, shares


def test_best_figures_are_those_of_ranking_by_the_law(synthetic):
    _, law, _ = synthetic
    table, shares = true_law()
    hits, gains, loss = 0.0, 0.0, 0.0
    for row, share in zip(table, shares):
        for place, probability in enumerate(sorted(row, reverse=True)[:10]):
            hits += share * probability
            gains += share * probability / math.log2(place + 2)
        loss -= share * sum(probability * math.log(probability) for probability in row)
    assert law["best"] == pytest.approx({"hr@10": hits, "ndcg@10": gains, "loss": loss}, rel=1e-12)
    marginal = [sum(share * row[item] for row, share in zip(table, shares)) for item in range(ITEMS)]
    assert law["popularity"]["hr@10"] == pytest.approx(sum(sorted(marginal)[-10:]), rel=1e-12)


def test_log_follows_the_law(synthetic):
    """Each pair of neighbours against its probability, and what the best ranking reaches on the log, within 5 sigma."""
    _, law, log = synthetic
    items = log["item_id"][: USERS * EVENTS].reshape(USERS, EVENTS)
    assert np.array_equal(log["timestamp"][: USERS * EVENTS].reshape(USERS, EVENTS), np.tile(np.arange(EVENTS), (USERS, 1)))
    table, shares = true_law()
    first = Counter((items[:, 0] // SIZE).tolist())
    for cluster, share in enumerate(shares):
        assert abs(first[cluster] - USERS * share) < 5 * (USERS * share * (1 - share)) ** 0.5
    last, following = items[:, :-1].ravel() // SIZE, items[:, 1:].ravel()
    for cluster, row in enumerate(table):
        drawn = np.bincount(following[last == cluster], minlength=ITEMS)
        expected = drawn.sum() * np.array(row)
        assert (abs(drawn - expected) < 5 * np.sqrt(expected) + 1).all()
    best = np.argsort(-np.array(table), axis=1)[:, :10]
    hits = (best[last] == following[:, None]).any(1)
    assert abs(hits.mean() - law["best"]["hr@10"]) < 5 * (0.25 / hits.size) ** 0.5


def test_every_item_is_in_the_catalog_and_gives_no_case(synthetic, tmp_path):
    folder, _, _ = synthetic
    config = PrepareConfig(str(folder / "log.parquet"), str(tmp_path / "dataset"), min_user_events=1, min_item_events=1)
    prepare(config, progress=lambda line: None)
    dataset = SequenceDataset.open(tmp_path / "dataset")
    assert (dataset.num_items, dataset.num_users) == (ITEMS, USERS + ITEMS)
    assert len(dataset.eval_cases("test").targets) == USERS
    _, offsets = dataset.train_sequences()
    assert sorted(set(np.diff(offsets).tolist())) == [1, EVENTS - 2]


def test_same_seed_same_bytes(synthetic, tmp_path):
    folder, _, _ = synthetic
    make(tmp_path / "again")
    make(tmp_path / "other", seed=1)
    log = (folder / "log.parquet").read_bytes()
    assert (tmp_path / "again/log.parquet").read_bytes() == log != (tmp_path / "other/log.parquet").read_bytes()


def test_log_is_written_in_parts(tmp_path, monkeypatch):
    """As many rows at a time as are allowed, so that memory does not grow with users, events or items."""
    monkeypatch.setitem(TOOL["events"].__globals__, "ROWS_AT_ONCE", 500)
    make(tmp_path)
    log = pq.ParquetFile(tmp_path / "log.parquet").metadata
    assert [log.row_group(i).num_rows for i in range(log.num_row_groups)] == [500] * (USERS * EVENTS // 500) + [ITEMS]


@pytest.mark.parametrize("arguments", [["--items", "1001"], ["--stay", "1.5"], ["--events", "2"]])
def test_bad_arguments_are_named(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["make_synthetic.py", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit):
        TOOL["main"]()
    assert f"{arguments[0]} is {arguments[1]}; it must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recipe_is_a_config():
    arguments = ["experiment=synthetic", "data.path=x", "output=y", "loss.num_negatives=1000"]
    loss = compose("train", TrainConfig, arguments).loss
    assert (loss.negatives, loss.num_negatives) == ("popularity", 1000)
