"""An approximate search: what it finds is what exact search finds, as far as its recall says, and never what is left out."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.scoring import ScoreConfig, score
from glintru_rec.scoring.index import IndexConfig, open_index
from tests.conftest import run_program

NUM_ITEMS, WIDTH, NUM_ROWS, K = 1200, 16, 90, 10
KINDS = ["ivf", "hnsw"]


@pytest.fixture(scope="module", params=["dot", "cosine", "bias"])
def artifact(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    similarity, has_bias = ("cosine" if request.param == "cosine" else "dot"), request.param == "bias"
    vectors = torch.randn(NUM_ITEMS, WIDTH + has_bias)
    vocabulary = Vocabulary(pa.array(np.arange(NUM_ITEMS) * 7), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), similarity, vectors, vocabulary, folder, **options)
    return str(folder)


dot_only = pytest.mark.parametrize("artifact", ["dot"], indirect=True)


@pytest.fixture
def config(artifact, tmp_path):
    """Two files; the histories of some users are longer than twice the items asked for, one is the whole catalog."""
    generator = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(2):
        histories = [generator.integers(NUM_ITEMS, size=size) * 7 for size in generator.integers(1, 60, NUM_ROWS)]
        histories[5] = np.arange(NUM_ITEMS - 3) * 7
        denied = [generator.integers(NUM_ITEMS, size=4) * 7 for _ in range(NUM_ROWS)]
        table = pa.table({"user_id": np.arange(NUM_ROWS) + 1000 * number, "history": histories, "not_these": denied})
        pq.write_table(table, tmp_path / "in" / f"part-{number}.parquet")
    return ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "exact"), "top_k", top_k=K, batch_size=32)


def with_index(config, tmp_path, kind, name="", **settings):
    settings = {"folder": str(tmp_path / "indexes"), "min_recall": 0.0} | settings
    return dataclasses.replace(config, output=str(tmp_path / (name or kind)), index=IndexConfig(kind, **settings))


def listed(config):
    rows = [row for number in range(2) for row in pq.read_table(f"{config.output}/part-{number}.parquet").to_pylist()]
    return {row["user_id"]: dict(zip(row["item_ids"], row["scores"])) for row in rows}


def outputs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(config, tmp_path, kind):
    """With the lists of the job and of each row. Users who have seen nearly all have what is left, searched exactly."""
    allow = pa.table({"item_id": np.delete(np.arange(NUM_ITEMS), np.arange(0, NUM_ITEMS, 9)) * 7})
    pq.write_table(allow, tmp_path / "allow.parquet")
    config = dataclasses.replace(config, allow=str(tmp_path / "allow.parquet"), deny_column="not_these")
    score(config)
    everywhere = {"num_probes": 10**6, "ef_search": 500, "min_recall": 0.99}
    approximate = with_index(config, tmp_path, kind, **everywhere)
    report = score(approximate)
    assert report.index.recall >= 0.99
    assert report.index.users == 2 * NUM_ROWS
    assert 2 <= report.index.searched_exactly < 2 * NUM_ROWS
    truth, found = listed(config), listed(approximate)
    assert found.keys() == truth.keys()
    shares = [len(found[user].keys() & best.keys()) / len(best) for user, best in truth.items() if best]
    assert np.mean(shares) == pytest.approx(report.index.recall, abs=1e-6)
    for user, best in truth.items():
        assert len(found[user]) == len(best)
        both = found[user].keys() & best.keys()
        np.testing.assert_allclose([found[user][item] for item in both], [best[item] for item in both], rtol=0, atol=1e-5)
        assert list(found[user].values()) == sorted(found[user].values(), reverse=True)


@dot_only
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_never_found(config, tmp_path, kind):
    """By an index that looks at little, too."""
    denied = np.arange(0, NUM_ITEMS, 2)
    pq.write_table(pa.table({"item_id": denied * 7}), tmp_path / "deny.parquet")
    config = dataclasses.replace(config, deny=str(tmp_path / "deny.parquet"), deny_column="not_these")
    approximate = with_index(config, tmp_path, kind, num_probes=2, ef_search=8)
    report = score(approximate)
    assert report.index.recall < 1
    assert json.loads((tmp_path / kind / "report.json").read_text())["index"] == dataclasses.asdict(report.index)
    rows = pq.read_table(config.input, partitioning=None).to_pylist()
    found = listed(approximate)
    assert len(found) == 2 * NUM_ROWS
    for row in rows:
        out = {*row["history"], *row["not_these"], *(denied * 7).tolist()}
        assert not out & found[row["user_id"]].keys()
        assert len(found[row["user_id"]]) == min(K, NUM_ITEMS - len(out))


@dot_only
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_built_once_and_is_the_same_with_any_number_of_threads(config, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.index._BLOCK_ITEMS", 700)
    artifact, before = Artifact.load(config.artifact), torch.get_num_threads()
    written = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            approximate = with_index(config, tmp_path, kind, f"{kind}-{num_threads}", folder=str(tmp_path / str(num_threads)))
            score(approximate)
            files = sorted((tmp_path / str(num_threads)).glob("[!.]*"))
            assert [path.suffix for path in files] == [".faiss", ".json"]
            written.append(([path.read_bytes() for path in files], outputs(tmp_path / f"{kind}-{num_threads}")))
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]
    settings = approximate.index
    inode = files[0].stat().st_ino
    open_index(artifact, dataclasses.replace(settings, num_probes=1, ef_search=9, min_recall=1.0), 1)
    assert [path.stat().st_ino for path in sorted((tmp_path / "3").glob("*.faiss"))] == [inode]
    left = tmp_path / "3" / f".partial-{files[0].name}-0123abcd"  # by a build that was killed
    left.write_bytes(files[0].read_bytes()[:99])
    open_index(artifact, dataclasses.replace(settings, num_lists=5, num_neighbors=4), 1)
    assert len(list((tmp_path / "3").glob("*.faiss"))) == 2
    assert [path.name for path in (tmp_path / "3").glob(".*")] == [".lock"]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(InputError, match=r"index .* cannot be used: it is not what was written; remove it"):
        open_index(artifact, settings, 1)


@dot_only
def test_too_little_recall_stops_the_job_before_it_begins(config, tmp_path):
    poor = with_index(config, tmp_path, "ivf", num_lists=60, num_probes=1, min_recall=0.9)
    with pytest.raises(
        InputError, match=r"index ivf finds 0\.\d+ of the exact top 10 of 180 .* less than index.min_recall=0.9"
    ):
        score(poor)
    assert not (tmp_path / "ivf").exists()
    better = dataclasses.replace(poor, index=dataclasses.replace(poor.index, num_probes=60))
    assert score(better).index.recall >= 0.99
    assert score(better).index is None  # all was done before: there is nothing to search


@dot_only
def test_nobody_to_measure_it_on(config, tmp_path):
    """One file is empty, the other cannot be read."""
    first, second = (tmp_path / "in" / f"part-{number}.parquet" for number in range(2))
    pq.write_table(pq.read_table(first).slice(0, 0), first)
    second.write_bytes(second.read_bytes()[:-9])
    report = score(with_index(config, tmp_path, "ivf", min_recall=1.0))
    assert (report.index.recall, report.index.users, report.rows_in, list(report.failed)) == (None, 0, 0, ["part-1.parquet"])


@pytest.mark.programs
@dot_only
def test_the_program_prints_the_recall(config, tmp_path):
    """Two ranks, one of which builds the index."""
    keys = ("artifact", "input", "output", "mode", "top_k", "batch_size")
    arguments = [f"{key}={getattr(config, key)}" for key in keys]
    result = run_program("score", *arguments, "index=hnsw", "index.min_recall=0.5", nproc=2)
    written = json.loads((tmp_path / "exact" / "report.json").read_text())["index"]
    expected = f"index hnsw: recall@10 {written['recall']:.4f} against exact search, of 180 users; 2 of them searched exactly"
    assert expected in result.stdout
    assert sorted(path.suffix for path in (tmp_path / f"{config.artifact}.index").glob("[!.]*")) == [".faiss", ".json"]
    score(with_index(config, tmp_path, "hnsw", "one", folder="", min_recall=0.5))
    assert outputs(tmp_path / "one") == outputs(tmp_path / "exact")


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        ({"kind": "pq"}, {}, "index.kind is 'pq'; it must be one of exact, ivf, hnsw"),
        ({"min_recall": 1.5}, {}, r"index.min_recall is 1.5; it must be in \[0, 1\]"),
        ({"num_probes": 0}, {}, "index.num_probes is 0; it must be at least 1"),
        ({"kind": "ivf"}, {"mode": "encode"}, "index.kind is 'ivf'; it must be exact, unless mode is 'top_k'"),
        ({"kind": "ivf"}, {"catalog": "split"}, "index.kind is 'ivf'; it must be exact, unless mode is 'top_k', catalog"),
    ],
)
def test_config_names_key_value_and_what_is_allowed(index, changes, message):
    with pytest.raises(InputError, match=message):
        ScoreConfig(**{"artifact": "a", "input": "i", "output": "o", "mode": "top_k"} | changes, index=IndexConfig(**index))
