"""Vectors of users and items, as files that another index or database reads: their dot products are the job's scores."""

import dataclasses

import faiss
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
from glintru_rec.scoring.scorer import Scorer
from tests.test_scoring_split import Largest

NUM_ITEMS, WIDTH, NUM_ROWS = 250, 16, 30


@pytest.fixture(params=["dot", "cosine", "bias"])
def artifact(request, tmp_path):
    torch.manual_seed(0)
    has_bias = request.param == "bias"
    vocabulary = Vocabulary(pa.array([f"item {i}" for i in range(NUM_ITEMS)]), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    vectors = torch.randn(NUM_ITEMS, WIDTH + has_bias)
    similarity = "cosine" if request.param == "cosine" else "dot"
    export_artifact(GlintRU(WIDTH), similarity, vectors, vocabulary, tmp_path / "artifact", **options)
    return str(tmp_path / "artifact")


def read_vectors(folder, column):
    """Ids and vectors of all files, as a reader of arrow's has them."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
    kind = table.schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind)
    assert kind.value_type == pa.float32()
    values = table["embedding"].combine_chunks().flatten().to_numpy()
    return table[column].to_pylist(), values.reshape(-1, kind.list_size)


def test_an_index_of_the_files_ranks_as_the_job_does(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.item_vectors._PART_ITEMS", 100)
    generator = np.random.default_rng(0)
    histories = [[f"item {i}" for i in generator.integers(NUM_ITEMS, size=9)] for _ in range(NUM_ROWS)]
    pq.write_table(pa.table({"user_id": range(NUM_ROWS), "history": histories}), tmp_path / "in.parquet")
    pq.write_table(pa.table({"item_id": [f"item {i}" for i in range(0, NUM_ITEMS, 4)] + ["?"]}), tmp_path / "deny.parquet")
    users = ScoreConfig(artifact, str(tmp_path / "in.parquet"), str(tmp_path / "users"), "encode")
    items = ScoreConfig(artifact, "", str(tmp_path / "items"), "items", deny=str(tmp_path / "deny.parquet"), batch_size=17)
    best = dataclasses.replace(
        users, output=str(tmp_path / "best"), mode="top_k", top_k=10, exclude_seen=False, deny=items.deny
    )
    score(users)
    score(best)
    report = score(items)
    assert (report.rows_in, report.rows_scored, report.unknown_listed_items) == (187, 187, 1)
    assert sorted(path.name for path in (tmp_path / "items").glob("*.parquet")) == ["part-00000.parquet", "part-00001.parquet"]

    item_ids, item_vectors = read_vectors(tmp_path / "items", "item_id")
    assert item_ids == [f"item {i}" for i in range(NUM_ITEMS) if i % 4]
    user_ids, user_vectors = read_vectors(tmp_path / "users", "user_id")
    assert user_ids == list(range(NUM_ROWS))
    index = faiss.IndexFlatIP(item_vectors.shape[1])
    index.add(item_vectors)
    scores, places = index.search(user_vectors, 10)
    truth = pq.read_table(tmp_path / "best" / "in.parquet")
    assert [[item_ids[place] for place in row] for row in places] == truth["item_ids"].to_pylist()
    np.testing.assert_allclose(scores, np.array(truth["scores"].to_pylist()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("artifact", ["dot"], indirect=True)
def test_a_part_that_is_missing_is_written_again(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.item_vectors._PART_ITEMS", 100)
    config = ScoreConfig(artifact, "", str(tmp_path / "items"), "items")
    score(config)
    part = tmp_path / "items" / "part-00001.parquet"
    before = part.read_bytes()
    part.unlink()
    report = score(config)
    assert (report.timing.fragments_before, report.timing.fragments_now, report.rows_in) == (2, 1, NUM_ITEMS)
    assert part.read_bytes() == before


@pytest.mark.parametrize("artifact", ["dot"], indirect=True)
def test_items_are_written_without_a_copy_of_them(artifact, tmp_path):
    pq.write_table(pa.table({"item_id": ["item 3"]}), tmp_path / "allow.parquet")
    opened = Artifact.load(artifact)
    with Largest() as largest:
        Scorer(ScoreConfig(artifact, "", "o", "items", allow=str(tmp_path / "allow.parquet")), opened)
    assert largest.num_bytes == 0


def test_items_have_no_input():
    with pytest.raises(InputError, match="input is 'in'; it must be left out, as mode is 'items'"):
        ScoreConfig("a", "in", "o", "items")
    with pytest.raises(InputError, match="deny_column is 'd'; it must be left out, as mode is 'items'"):
        ScoreConfig("a", "", "o", "items", deny_column="d")
    with pytest.raises(InputError, match="input is ''; it must be a text that is not empty"):
        ScoreConfig("a", "", "o", "encode")
