"""Allow- and deny-lists of a job, and of a row: the best of what is left, exactly."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.scoring import ScoreConfig, score

NUM_ITEMS, WIDTH, NUM_ROWS, FIRST_ID = 80, 16, 40, 2**60


@pytest.fixture(scope="module", params=["dot", "cosine", "bias"])
def artifact(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    similarity, has_bias = ("cosine" if request.param == "cosine" else "dot"), request.param == "bias"
    vectors = torch.randn(NUM_ITEMS, WIDTH + has_bias)
    vocabulary = Vocabulary(pa.array(np.arange(NUM_ITEMS) + FIRST_ID), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), similarity, vectors, vocabulary, folder, **options)
    return str(folder)


@pytest.fixture
def config(artifact, tmp_path):
    """Some rows deny items, among them unknown ones; one has a null there, one has no list."""
    generator = np.random.default_rng(0)
    lists = [(generator.integers(NUM_ITEMS, size=size) + FIRST_ID).tolist() for size in generator.integers(1, 9, 2 * NUM_ROWS)]
    denied = [*lists[NUM_ROWS:-3], [7, FIRST_ID + 3], [FIRST_ID, None], None]
    columns = {"user_id": range(NUM_ROWS), "history": lists[:NUM_ROWS], "not_these": denied}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    return ScoreConfig(artifact, str(tmp_path / "in.parquet"), str(tmp_path / "out"), "top_k", top_k=12, batch_size=16)


def item_file(path, items):
    pq.write_table(pa.table({"item_id": items}), path)
    return str(path)


def listed(config):
    """Each user's items with their scores, in the order found."""
    rows = pq.read_table(f"{config.output}/in.parquet", partitioning=None).to_pylist()
    return {row["user_id"]: list(zip(row["item_ids"], row["scores"])) for row in rows}


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_what_is_left_comes_in_the_order_of_the_whole_catalog(config, tmp_path, exclude_seen):
    """The truth is the ranking of all items, without any list, from which what is not allowed is crossed out."""
    whole = dataclasses.replace(config, top_k=NUM_ITEMS, output=str(tmp_path / "whole"), exclude_seen=exclude_seen)
    score(whole)
    allowed, banned = set(range(FIRST_ID, FIRST_ID + 30)), {FIRST_ID + 5, FIRST_ID + 7, FIRST_ID + 70}
    lists = {
        "allow": item_file(tmp_path / "allow.parquet", [*sorted(allowed, reverse=True), FIRST_ID, 99]),
        "deny": item_file(tmp_path / "deny.parquet", [*banned, 98, 97]),
        "deny_column": "not_these",
    }
    table = pq.read_table(config.input)
    not_these = dict(zip(table["user_id"].to_pylist(), table["not_these"].to_pylist()))
    for number, keys in enumerate([("allow",), ("deny",), ("deny_column",), ("allow", "deny", "deny_column")]):
        given = {key: lists[key] for key in keys}
        some = dataclasses.replace(config, output=str(tmp_path / f"some-{number}"), exclude_seen=exclude_seen, **given)
        report = score(some)
        assert report.unknown_listed_items == ("allow" in keys) + 2 * ("deny" in keys)
        by_row = "deny_column" in keys
        assert report.rows_set_aside == ({"null_denied": 1, "null_denied_item": 1} if by_row else {})
        found = listed(some)
        for user, ranking in listed(whole).items():
            if by_row and user >= NUM_ROWS - 2:
                assert user not in found
                continue
            out = (banned if "deny" in keys else set()) | (set(not_these[user]) if by_row else set())
            left = [pair for pair in ranking if pair[0] not in out and ("allow" not in keys or pair[0] in allowed)][:12]
            assert [item for item, _ in found[user]] == [item for item, _ in left]
            np.testing.assert_allclose([s for _, s in found[user]], [s for _, s in left], rtol=0, atol=1e-5)


def test_another_list_under_the_same_name_is_another_job(config, tmp_path):
    path = item_file(tmp_path / "deny.parquet", [FIRST_ID])
    with_list = dataclasses.replace(config, deny=path)
    score(with_list)
    item_file(tmp_path / "deny.parquet", [FIRST_ID + 1])
    with pytest.raises(InputError, match=r"begun by another job: deny was '\w+', now '\w+'"):
        score(with_list)


def test_lists_that_cannot_be_used(config, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            score(dataclasses.replace(config, **changes))
        assert not (tmp_path / "out").exists()

    refused("allow '.*none' is not readable parquet: there is no file", allow=str(tmp_path / "none"))
    refused("deny '.*' has no column 'which'; it has user_id, history", deny=config.input, item_column="which")
    refused(r"deny '.*' holds 1 null\(s\) in column", deny=item_file(tmp_path / "a", [1, None]))
    refused("allow '.*': the vocabulary holds int64 item ids", allow=item_file(tmp_path / "b", ["x"]))
    twice = pa.table([[FIRST_ID], [FIRST_ID]], names=["item_id", "item_id"])
    pq.write_table(twice, tmp_path / "d")
    refused("deny '.*' has 2 columns called 'item_id'; rename all but one", deny=str(tmp_path / "d"))
    refused("leave no item of the catalog", allow=item_file(tmp_path / "c", [5]))
    refused("deny_column is 'not_these'; it must be left out, as mode is 'encode'", mode="encode", deny_column="not_these")
    refused("must be left out, as empty_history is 'popular'", deny=config.input, empty_history="popular")
    refused("has no column 'nowhere'", deny_column="nowhere")
