"""Side features of events, from the log to scores: what is next depends on them, and nothing else changes without them."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec.config import compose
from glintru_rec.data.batches import TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.data.reader import RowGroupBatches
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.encoders import ENCODERS, build_encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, RecurrentScoringModule
from glintru_rec.jagged import keep_last, offsets_from_lengths
from glintru_rec.model import SequenceModel
from glintru_rec.programs.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate_run
from glintru_rec.programs.export import ExportConfig, export_run
from glintru_rec.programs.train import train
from glintru_rec.scoring import score, update_states
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.config import DataConfig, TrainConfig
from tests.test_export import PlainTable

NUM_ITEMS, WIDTH, MAX_SEQ_LEN = 40, 16, 20


def planted_log(num_users: int = 300, seed: int = 0) -> pa.Table:
    """After a view comes the next item, after a purchase the 13th after it."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        item = int(rng.integers(NUM_ITEMS))
        for time in range(int(rng.integers(8, 25))):
            bought = bool(rng.integers(2))
            rows.append((user, 100 + item, time, "buy" if bought else "view", item % 5, bought))
            item = (item + (13 if bought else 1)) % NUM_ITEMS
    names = ["user_id", "item_id", "timestamp", "action", "stars", "paid"]
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows))})


def train_config(folder, name: str, *overrides: str) -> TrainConfig:
    small = [
        "model.embedding_dim=16",
        "model.options.num_heads=2",
        f"data.max_seq_len={MAX_SEQ_LEN}",
        "model.options.dropout=0",
    ]
    rates = ["optimizer.learning_rate=0.01", "table.learning_rate=0.1", "trainer.batch_targets=128", "trainer.max_epochs=3"]
    paths = [f"data.path={folder / 'dataset'}", f"output={folder / name}"]
    return compose("train", TrainConfig, [*small, *rates, *paths, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with side features, and two runs: with one of them and without."""
    folder = tmp_path_factory.mktemp("side")
    pq.write_table(planted_log(), folder / "log.parquet")
    columns = ["action", "stars", "paid"]
    prepare(PrepareConfig(str(folder / "log.parquet"), str(folder / "dataset"), side_columns=columns), lambda _: None)
    for name, features in (("with", "[action]"), ("without", "[]")):
        assert train(train_config(folder, name, f"model.side_features={features}")) == 0
    export_run(ExportConfig(checkpoint=str(folder / "with"), output=str(folder / "artifact")))
    return folder


def figures(folder, run: str) -> dict:
    output = folder / f"{run}.json"
    data = EvaluateDataConfig(str(folder / "dataset"))
    evaluate_run(EvaluateConfig(str(folder / run), str(output), data, exclude_seen=False))
    return json.loads(output.read_text())["metrics"]


def test_what_depends_on_the_action_is_learnt_with_it_alone(folder):
    """The action decides between two items: at best every other first place without it, all with it."""
    assert figures(folder, "with")["hr@1"] > 0.9
    assert figures(folder, "without")["hr@1"] < 0.65


def test_prepared_indices_are_the_logs_values(folder):
    log = planted_log()  # in the order of users and times
    dataset = SequenceDataset.open(folder / "dataset", ["stars", "action", "paid"])
    assert dataset.manifest["side_features"] == {"action": 3, "stars": 6, "paid": 3}
    assert dataset.side_ids.shape == (len(log), 3)
    for place, name in enumerate(("stars", "action", "paid")):
        values = dataset.side.decode(name, dataset.side_ids[:, place]).to_pylist()
        assert values == [str(value).lower() for value in log[name].to_pylist()]
    counts = Counter(log["action"].to_pylist())
    assert dataset.side.values["action"] == [value for value, _ in counts.most_common()]


def test_windows_carry_the_side_features_of_their_events():
    """Cut, shuffled or read backwards: every item keeps its own."""
    lengths = np.array([7, 2, 30])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items, side = np.arange(39), np.stack([np.arange(39) % 7, np.arange(39) % 3], axis=1).astype(np.int16)
    batches = TrainingBatches(items, offsets, 5, 8, seed=0, reversed_share=0.5, reversed_epochs=1, side_ids=side)
    for batch in batches.epoch(0):
        assert batch.side_ids.dtype == torch.int64
        assert batch.side_ids.tolist() == side[batch.item_ids.numpy()].tolist()


def test_a_dataset_on_the_disk_gives_the_side_features_of_its_events(folder):
    """A star is its item's number modulo 5, in every batch, also one of a rank that has no row group left."""
    dataset = RowGroupDataset.open(folder / "dataset", 1, ["stars"])
    batches = RowGroupBatches(dataset, MAX_SEQ_LEN, 128, seed=0)
    for batch in batches.epoch(0):
        items = dataset.vocabulary.decode(batch.item_ids.numpy()).to_numpy()
        stars = dataset.side.decode("stars", batch.side_ids[:, 0].numpy()).to_pylist()
        assert stars == [str(item % 5) for item in items]
    batches.given = ()
    assert batches._batch(0).side_ids.shape == (0, 1)
    (cases,) = dataset.case_blocks("test")
    assert cases.history_side.shape == (len(cases.history_items), 1)


def make_model(name: str, sizes=(4, 3)) -> SequenceModel:
    torch.manual_seed(0)
    encoder, table = build_encoder(name, WIDTH, {}), PlainTable(NUM_ITEMS)
    side = SideEmbeddings(sizes, WIDTH, init_std=1.0)
    return SequenceModel(table, encoder, "cosine" if encoder.members > 1 else "dot", side=side).double().eval()


@pytest.mark.parametrize("name", [*ENCODERS, "glint_ru+lru_rec"])
def test_position_by_position_it_is_the_sum_and_the_future_is_not_seen(name):
    """Forward is the encoder on sums; step by step the same; what event n is like reaches no query before n."""
    model, lengths = make_model(name), torch.tensor([6, 2, 9])
    offsets = offsets_from_lengths(lengths)
    item_ids, side_ids = torch.randint(NUM_ITEMS, (17,)), torch.stack([torch.randint(4, (17,)), torch.randint(3, (17,))], dim=1)
    x = model.embeddings(model.table.embedding.weight[item_ids])
    for column, table in enumerate(model.side.tables):
        x = x + table.weight[side_ids[:, column]]
    last = [5, 7, 16]
    inputs = [place for place in range(17) if place not in last]
    want = model.query_vectors(model.encoder(x[inputs], offsets_from_lengths(lengths - 1)))
    output = model(item_ids, offsets, item_ids[:0], side_ids=side_ids)
    assert torch.allclose(output.query, want, atol=1e-12)

    changed = side_ids.clone()
    changed[3] = (changed[3] + 1) % 3
    again = model(item_ids, offsets, item_ids[:0], side_ids=changed).query
    assert torch.equal(again[:3], output.query[:3])  # position 2 predicts event 3
    assert not torch.allclose(again[3], output.query[3])
    assert torch.equal(model(item_ids, offsets, item_ids[:0], side_ids=changed).positive, output.positive)

    if model.encoder.recurrent:
        state = model.encoder.init_state(1)
        for place in range(6):
            row = model.table.embedding.weight[item_ids[place : place + 1]]
            step = model.side(model.embeddings(row), side_ids[place : place + 1])
            hidden, state = model.encoder.step(step, state)
        query, _ = model.encode(item_ids[:6], torch.tensor([0, 6]), item_ids[:0], side_ids[:6])
        assert torch.allclose(model.query_vectors(hidden), query, atol=1e-10)


def test_without_side_features_nothing_is_drawn_and_nothing_changes():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    none = SideEmbeddings([], WIDTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(none.parameters())
    x = torch.randn(5, WIDTH)
    assert none(x, None) is x
    older = "282aade45deb45c8"  # what the default model's was before there were side features
    assert TrainConfig(output="o", data=DataConfig(path="d")).model_fingerprint() == older


def test_an_unknown_value_adds_nothing_until_it_is_trained():
    side = SideEmbeddings([4, 3], WIDTH)
    x = torch.randn(5, WIDTH)
    assert torch.equal(side(x, torch.zeros(5, 2, dtype=torch.int64)), x)
    with pytest.raises(ValueError, match="side_ids are missing: the model reads 2"):
        side(x, None)
    with pytest.raises(ValueError, match=r"side_ids are \[5, 1\]; they must be \[5, 2\]"):
        side(x, torch.zeros(5, 1, dtype=torch.int64))


def test_events_that_are_carried_on_have_side_features_of_their_own():
    side = SideEmbeddings([3], WIDTH)
    module = RecurrentScoringModule(ENCODERS["glint_ru"](WIDTH), torch.randn(NUM_ITEMS, WIDTH), "dot", MAX_SEQ_LEN, side=side)
    events, lengths = torch.arange(5), torch.tensor([2, 3])
    for given in (4, 6):
        with pytest.raises(ValueError, match=f"{given} rows of side_ids were given for 5 items"):
            module.advance(events, lengths, module.init_state(2), torch.zeros(given, 1, dtype=torch.int64))


def histories(folder, num_users: int = 30):
    """Original items, actions (some null or never seen) and what the eager model says of them, with the whole table."""
    run = load_unsharded(folder / "with")
    rng = np.random.default_rng(1)
    actions = SideVocabulary.load(folder / "with")
    items = [(100 + rng.integers(NUM_ITEMS, size=rng.integers(1, 2 * MAX_SEQ_LEN))).tolist() for _ in range(num_users)]
    told = [[["view", "buy", None, "return"][k] for k in rng.integers(4, size=len(each))] for each in items]
    queries = []
    for history, said in zip(items, told):
        item_ids = torch.from_numpy(run.vocabulary.encode(pa.array(history)))
        side_ids = torch.from_numpy(actions.encode("action", pa.array(said, pa.string()))).unsqueeze(1)
        offsets = torch.tensor([0, len(history)])
        recent, kept = keep_last(item_ids, offsets, MAX_SEQ_LEN)
        with torch.no_grad():
            queries.append(run.model.encode(recent, kept, recent[:0], keep_last(side_ids, offsets, MAX_SEQ_LEN)[0])[0][0])
    return run, items, told, torch.stack(queries)


def test_a_job_scores_lists_of_items_and_side_features(folder, tmp_path):
    """Modes encode, top_k and candidates against the model; unknown items leave with their values; bad rows are set aside."""
    run, items, told, queries = histories(folder)
    items[0].insert(1, 7), told[0].insert(1, "buy")  # no such item
    users = list(range(len(items) + 2))
    table = {"user_id": users, "history": [*items, [101, 102], [101, 102]], "action": [*told, ["view"], None]}
    table["candidates"] = [[101, 102, 103]] * len(users)
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    read = {}
    for mode in ("encode", "top_k", "candidates"):
        output = tmp_path / mode
        report = score(ScoreConfig(str(folder / "artifact"), str(tmp_path / "in.parquet"), str(output), mode, top_k=3))
        assert report.rows_set_aside == {"side_feature_of_other_length": 1}
        assert report.unknown_history_items == 1
        read[mode] = pq.read_table(output / "in.parquet")
    got = torch.tensor(read["encode"]["embedding"].to_pylist())
    assert torch.allclose(got[:-1], queries, atol=1e-5)
    unknown = run.model.encode(
        torch.from_numpy(run.vocabulary.encode(pa.array([101, 102]))),
        torch.tensor([0, 2]),
        torch.tensor([], dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
    )[0]
    assert torch.allclose(got[-1:], unknown, atol=1e-5)  # a row without a list
    vectors = run.model.table(torch.arange(NUM_ITEMS), torch.arange(0))[0]
    scores = queries @ vectors.t()
    wanted = torch.from_numpy(run.vocabulary.encode(pa.array([101, 102, 103])))
    assert torch.allclose(torch.tensor(read["candidates"]["scores"].to_pylist()[:-1]), scores[:, wanted], atol=1e-4)
    for row, history in enumerate(items):
        seen = run.vocabulary.encode(pa.array([item for item in history if item >= 100]))
        best = scores[row].index_fill(0, torch.from_numpy(seen), -torch.inf).topk(3)
        found = best.values > -torch.inf
        assert np.allclose(read["top_k"]["scores"][row].as_py(), best.values[found].tolist(), atol=1e-4)

    lacking = pa.table({name: column for name, column in table.items() if name != "action"})
    pq.write_table(lacking, tmp_path / "lacking.parquet")
    with pytest.raises(InputError, match=r"has no column 'action'.*reads a list of this side feature"):
        score(ScoreConfig(str(folder / "artifact"), str(tmp_path / "lacking.parquet"), str(tmp_path / "no"), "encode"))
    table["action"] = [[0.5] * len(history) for history in table["history"]]
    pq.write_table(pa.table(table), tmp_path / "floats.parquet")
    with pytest.raises(InputError, match=r"column 'action' .* has type list<.*double>; it must hold lists"):
        score(ScoreConfig(str(folder / "artifact"), str(tmp_path / "floats.parquet"), str(tmp_path / "no"), "encode"))


def test_updates_give_what_scoring_afresh_gives(folder, tmp_path):
    """Events in two updates, with their actions; the state after them is that of the whole history."""
    _, items, told, _ = histories(folder)
    items, told = [each[:MAX_SEQ_LEN] for each in items], [each[:MAX_SEQ_LEN] for each in told]
    rows = [(u, i, t, a) for u, (its, acts) in enumerate(zip(items, told)) for t, (i, a) in enumerate(zip(its, acts))]
    for number, part in enumerate(([row for row in rows if row[2] < 5], [row for row in rows if row[2] >= 5])):
        columns = dict(zip(("user_id", "item_id", "timestamp", "action"), map(list, zip(*part))))
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
        update = ScoreConfig(
            str(folder / "artifact"),
            str(tmp_path / f"{number}.parquet"),
            str(tmp_path / f"out{number}"),
            "update",
            state=str(tmp_path / "state"),
            top_k=5,
            exclude_seen=False,
        )
        update_states(update)
    pq.write_table(pa.table({"user_id": range(len(items)), "history": items, "action": told}), tmp_path / "whole.parquet")
    whole = ScoreConfig(str(folder / "artifact"), str(tmp_path / "whole.parquet"), str(tmp_path / "afresh"), "top_k", top_k=5)
    whole.exclude_seen = False
    score(whole)
    afresh = {row["user_id"]: row for row in pq.read_table(tmp_path / "afresh/whole.parquet").to_pylist()}
    carried = pq.read_table(tmp_path / "out1/part-00000.parquet").to_pylist()
    assert len(carried) == sum(len(each) > 5 for each in items) > 10
    for row in carried:
        assert np.allclose(row["scores"], afresh[row["user_id"]]["scores"], atol=1e-4)


def test_the_artifact_says_what_it_reads(folder, tmp_path):
    artifact = Artifact.load(folder / "artifact")
    assert artifact.manifest["side_features"] == {"action": 3}
    assert artifact.side.values == SideVocabulary.load(folder / "with").values
    assert artifact.manifest["signature"]["step"]["inputs"][-1] == {"name": "side_ids", "dtype": "int64", "shape": ["B", 1]}
    assert "vocabulary/side_features.json" in artifact.manifest["files"]
    with pytest.raises(InputError, match="no place for side features, and the model reads action"):
        export_run(ExportConfig(checkpoint=str(folder / "with"), output=str(tmp_path / "pt2"), format="pt2"))
    written = tmp_path / "histories.parquet"
    SequenceDataset.open(folder / "dataset", ["action"]).write_histories(written, "test")
    table = pq.read_table(written)
    assert [len(each) for each in table["action"].to_pylist()] == [len(each) for each in table["history"].to_pylist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side_columns": ["timestamp"]}, "side_columns are .* they must differ"),
        ({"side_columns": ["colour"]}, "has no column 'colour'"),
        ({"side_columns": ["weight"]}, "side column 'weight' of .* has type DOUBLE; write whole numbers"),
        ({"side_columns": ["serial"]}, "side column 'serial' has more than 10,000 values"),
    ],
)
def test_prepare_refuses(tmp_path, changes, message):
    log = pa.table({"user_id": np.arange(10_001), "item_id": np.zeros(10_001, int), "timestamp": np.arange(10_001)})
    log = log.append_column("weight", pa.array(np.arange(10_001) / 2)).append_column("serial", pa.array(np.arange(10_001)))
    pq.write_table(log, tmp_path / "log.parquet")
    with pytest.raises(InputError, match=message):
        prepare(PrepareConfig(str(tmp_path / "log.parquet"), str(tmp_path / "out"), 1, **changes), lambda _: None)


def test_a_run_and_a_dataset_of_other_values_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="has no side feature 'colour'; it has action, stars, paid"):
        SequenceDataset.open(folder / "dataset", ["colour"])
    log = planted_log()
    swapped = pa.array([{"buy": "view", "view": "purchase"}[value] for value in log["action"].to_pylist()])
    pq.write_table(log.set_column(3, "action", swapped), tmp_path / "log.parquet")
    other = PrepareConfig(str(tmp_path / "log.parquet"), str(tmp_path / "dataset"), side_columns=["action"])
    prepare(other, lambda _: None)
    config = EvaluateConfig(str(folder / "with"), str(tmp_path / "e.json"), EvaluateDataConfig(str(tmp_path / "dataset")))
    refusal = "2 values of side feature 'action', and they are not the 2 of the dataset"
    with pytest.raises(InputError, match=refusal):
        evaluate_run(config)
    with pytest.raises(InputError, match=refusal):  # neither does a run start from it: the items alone are the same
        train(train_config(tmp_path, "run", "model.side_features=[action]", f"trainer.init_from={folder / 'with'}"))


def test_text_logs_have_values_as_they_are_written(tmp_path):
    """A field that is empty is unknown, as null is; '04' is not '4'; MovieLens files have their rating."""
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,kind\n" + "".join(f"1,{i},{i},{k}\n" for i, k in enumerate(
        ["4", "04", "", '""', "4"])))  # fmt: skip
    config = PrepareConfig(str(tmp_path / "log.csv"), str(tmp_path / "csv"), 1, 1, side_columns=["kind"])
    prepare(config, lambda _: None)
    dataset = SequenceDataset.open(tmp_path / "csv", ["kind"])
    assert dataset.side.decode("kind", dataset.side_ids[:, 0]).to_pylist() == ["4", "04", None, None, "4"]
    (tmp_path / "u.data").write_text("".join(f"1\t{i}\t{i % 2 + 3}\t{i}\n" for i in range(4)))
    prepare(PrepareConfig(str(tmp_path / "u.data"), str(tmp_path / "ml"), 1, 1, side_columns=["rating"]), lambda _: None)
    assert SequenceDataset.open(tmp_path / "ml", ["rating"]).side.values == {"rating": ["3", "4"]}
