"""A ranking dataset: what each example may see, and batches that share histories."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec.encoders import GlintRU, SASRec
from glintru_rec.errors import InputError
from glintru_rec.ranking.batches import RankingBatches
from glintru_rec.ranking.dataset import RankingDataset
from glintru_rec.ranking.model import RankingModel, RankingModelConfig
from glintru_rec.ranking.prepare import PrepareRankingConfig, prepare_ranking
from glintru_rec.ranking.tower import SequenceTower

EVENTS = """user_id,item_id,stars,timestamp
u2,i1,5,20
u1,i1,4,10
u1,i2,1,30
u1,i3,,30
u2,i2,2,40
u1,i1,5,50
,i1,3,60
u3,i1,3,61
u1,i9,5,62
u2,i3,1,soon
u4,i2,4,70
u4,i3,4,71
,,2,never
"""
FEATURES = {
    "tasks": {"like": "stars >= 4", "stars": "stars"},
    "sparse": {"user": "user_id", "tags": "string_split(tags, ' ')"},
    "dense": {"before": "count(*) OVER user_past", "item_mean": "avg(stars) OVER item_past"},
    "sequence": {"stars": "stars", "gap": "event_time - lag(event_time, 1, event_time) OVER user_order"},
}


@pytest.fixture
def small(tmp_path):
    (tmp_path / "events.csv").write_text(EVENTS)
    (tmp_path / "movies.item").write_text("item_id:token\ttags:token_seq\ni1\ta b\ni2\tb\ni3\t\n")
    return PrepareRankingConfig(
        str(tmp_path / "events.csv"),
        str(tmp_path / "dataset"),
        items=str(tmp_path / "movies.item"),
        valid_share=0.2,
        test_share=0.2,
        **FEATURES,
    )


def test_every_event_knows_its_strict_past(small):
    manifest = prepare_ranking(small)
    data = RankingDataset.open(small.output)
    assert manifest["set_aside"] == {"null_or_bad_user": 2, "null_or_bad_item": 0, "null_or_bad_time": 1}
    assert manifest["events"] == {"train": 6, "valid": 2, "test": 2}
    # The last row, without a user, an item and a time, counts once.
    assert sum(manifest["events"].values()) + sum(manifest["set_aside"].values()) == len(EVENTS.splitlines()) - 1
    # u1: i1@10 i2@30 i3@30 i1@50 i9@62    u2: i1@20 i2@40    u3: i1@61    u4: i2@70 i3@71
    assert data.user.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 3, 3]
    assert data.seen.tolist() == [0, 1, 1, 3, 4, 0, 1, 0, 0, 1]  # events of one time do not see each other
    assert data.split.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 2, 2]
    like, stars = data.labels.T
    np.testing.assert_equal(like.tolist(), [1, 0, np.nan, 1, 1, 1, 0, 0, 1, 1])
    np.testing.assert_equal(stars.tolist(), [4, 1, np.nan, 5, 5, 5, 2, 3, 4, 4])
    assert manifest["tasks"] == {"like": "binary", "stars": "number"}
    # Values are those of the training period (6 events); i9, u3 and u4 are not in it.
    items = pq.read_table(f"{small.output}/vocabulary/item.parquet")["value"].to_pylist()
    assert items == ["i1", "i2", "i3"]
    assert [([None, *items])[item] for item in data.sequence["item"]] == [
        "i1",
        "i2",
        "i3",
        "i1",
        None,
        "i1",
        "i2",
        "i1",
        "i2",
        "i3",
    ]
    assert data.sparse["user"].values.tolist() == [1, 1, 1, 1, 1, 2, 2, 0, 0, 0]
    tags = np.split(data.sparse["tags"].values, data.sparse["tags"].offsets[1:-1])
    names = pq.read_table(f"{small.output}/vocabulary/sparse.tags.parquet")["value"].to_pylist()
    assert [[names[tag - 1] for tag in event] for event in tags[:5]] == [["a", "b"], ["b"], [], ["a", "b"], []]
    gaps = pq.read_table(f"{small.output}/vocabulary/sequence.gap.parquet")["value"].to_pylist()
    assert [([None, *gaps])[gap] for gap in data.sequence["gap"][:4]] == [0, 20, 0, 20]
    # Scaled by the training period: the counts there are 0 1 1 3 0 1.
    scale = manifest["dense"]["before"]
    assert (scale["mean"], scale["deviation"]) == pytest.approx((1.0, 1.0))
    assert data.dense[:, 0].tolist() == pytest.approx([-1, 0, 0, 2, 3, -1, 0, -1, -1, 0])
    assert data.dense[0, 1] == 0  # nobody had rated i1 before: null
    log = pq.read_table(f"{small.output}/train_log.parquet")
    assert log["timestamp"].to_pylist() == [20, 10, 30, 30, 40, 50]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"events": "/nowhere.csv"}, "events=/nowhere.csv cannot be read"),
        ({"tasks": {}}, "at least one name: expression"),
        ({"tasks": {"like": "starz > 3"}}, "starz"),
        ({"sparse": {"a b": "user_id"}}, "letters, digits and _"),
        ({"sequence": {"item": "item_id"}}, "without 'item'"),
        ({"sequence": {"tags": "string_split(tags, ' ')"}}, r"sequence.tags gives list<.*>: a history has one value"),
        ({"dense": {"tags": "tags"}}, "dense.tags gives string, which is no number"),
        ({"tasks": {"who": "user_id"}}, "tasks.who gives string, which is no number"),
        ({"time_column": "when"}, "no time_column 'when'; it has user_id, item_id, stars, timestamp"),
        ({"valid_share": 0.6}, "valid_share is 0.6"),
        ({"users": "events.csv"}, "one row each is needed"),
    ],
)
def test_prepare_refuses(small, tmp_path, changes, message):
    if "users" in changes:
        changes = {"users": small.events}
    with pytest.raises(InputError, match=message):
        prepare_ranking(PrepareRankingConfig(**{**vars(small), **changes}))
    assert not (tmp_path / "dataset").exists()


def test_a_damaged_dataset_is_refused(small, tmp_path):
    prepare_ranking(small)
    manifest = json.loads((tmp_path / "dataset/manifest.json").read_text())
    manifest["num_embeddings"]["item"] = 2
    (tmp_path / "dataset/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"'item' holds an id outside \[0, 2\)"):
        RankingDataset.open(tmp_path / "dataset")
    with pytest.raises(InputError, match="no ranking dataset"):
        RankingDataset.open(tmp_path)


def test_a_sequence_feature_has_one_value_for_each_event(small, tmp_path):
    small.time_column = "TimeStamp"  # DuckDB does not mind
    prepare_ranking(small)
    file = tmp_path / "dataset/events.parquet"
    events = pq.read_table(file)
    place = events.column_names.index("sequence:gap")
    pq.write_table(events.set_column(place, "sequence:gap", events["sparse:tags"]), file)
    with pytest.raises(InputError, match=r"'sequence:gap' has \d+ values for 10 events"):
        RankingDataset.open(tmp_path / "dataset")


def test_a_dataset_needs_labels_but_no_sparse_features(ranking_data):
    data = RankingDataset.open(ranking_data)
    data = replace(data, sparse={}, manifest={**data.manifest, "tasks": {"odd": "binary"}})
    batch = next(RankingBatches(data, "train", 10, 4, 64).epoch()).to(torch.device("cpu"))
    tower = SequenceTower(data.num_embeddings("sequence"), GlintRU(16, num_heads=2))
    model = RankingModel(["odd"], {}, data.dense.shape[1], tower, RankingModelConfig(embedding_dim=8))
    assert model(batch).shape == batch.labels.shape
    with pytest.raises(InputError, match="no event of the train period has a label of odd"):
        RankingBatches(replace(data, labels=np.full_like(data.labels, np.nan)), "train", 10, 4, 64)


@pytest.mark.parametrize("encoder", [GlintRU, SASRec])
def test_examples_that_share_a_history_get_what_each_alone_would(ranking_data, encoder):
    """Blocks of 1, the usual layout of impressions, and blocks of 16 predict the same; every example comes once."""
    data = RankingDataset.open(ranking_data)
    torch.manual_seed(0)
    tower = SequenceTower(data.num_embeddings("sequence"), encoder(16, num_heads=2), init_std=0.5)
    config = RankingModelConfig(embedding_dim=8)
    model = RankingModel(["odd"], data.num_embeddings("sparse"), data.dense.shape[1], tower, config, 0.5).eval()
    predicted = {}
    for block in (1, 16):
        batches = RankingBatches(data, "valid", max_seq_len=1000, block_examples=block, batch_examples=100)
        got = [(batch.examples, model(batch)) for batch in batches.epoch()]
        assert batches.longest_history == max(int(batch.histories["item"].lengths().max()) for batch in batches.epoch())
        examples = torch.cat([each for each, _ in got])
        assert sorted(examples.tolist()) == np.flatnonzero(data.split == 1).tolist()
        predicted[block] = torch.cat([each for _, each in got])[examples.argsort()]
    torch.testing.assert_close(predicted[1], predicted[16], atol=1e-5, rtol=1e-5)


def labelled(batch) -> list[int]:
    return batch.examples[~batch.labels[:, 0].isnan()].tolist()


def test_ranks_share_an_epoch(ranking_data):
    data = RankingDataset.open(ranking_data)
    ranks = [RankingBatches(data, "train", 10, 7, 64, rank, 3) for rank in range(3)]
    batches_of_ranks = [list(batches.epoch(seed=5, epoch=2)) for batches in ranks]
    for together in zip(*batches_of_ranks):  # TorchRec asks for this
        assert len({batch.seen.numel() for batch in together}) == 1
    epochs = [[labelled(batch) for batch in batches] for batches in batches_of_ranks]
    assert len({len(epoch) for epoch in epochs}) == 1
    assert all(batch for epoch in epochs for batch in epoch)
    together = [example for epoch in epochs for batch in epoch for example in batch]
    assert set(together) == set(np.flatnonzero(data.split == 0).tolist())
    assert len(together) - len(set(together)) <= 2 * 7  # at most two blocks come twice, to fill up the ranks
    again = [labelled(batch) for batch in ranks[0].epoch(seed=5, epoch=2)]
    assert again == epochs[0] != [labelled(batch) for batch in ranks[0].epoch(seed=5, epoch=3)]


def test_histories_are_cut_to_the_latest_events(ranking_data):
    data = RankingDataset.open(ranking_data)
    for batch in RankingBatches(data, "train", max_seq_len=4, block_examples=3, batch_examples=50).epoch():
        whole = torch.tensor(data.seen)[batch.examples]
        assert bool((batch.seen >= whole.clamp(max=4)).all())
        assert bool((batch.seen <= whole).all())
        items, owner = batch.histories["item"], torch.repeat_interleave(batch.histories["candidate"].lengths())
        for example, seen, sequence in zip(batch.examples.tolist(), batch.seen.tolist(), owner.tolist()):
            history = items.values()[items.offsets()[sequence] :][:seen]
            first = np.searchsorted(data.user, data.user[example])
            stop = first + data.seen[example]
            assert history.tolist() == data.sequence["item"][stop - seen : stop].tolist()
