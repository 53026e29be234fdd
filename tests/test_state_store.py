"""The store of user states: carried on event by event, it gives what whole histories give, whatever is cut, late or killed."""

import functools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glintru_rec import Ensemble, GlintRU, LRURec, RecGRELA, SASRec
from glintru_rec.config import compose
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders.rec_grela_block import RecGRELAState
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.model import SequenceModel
from glintru_rec.programs.score import score_program
from glintru_rec.scoring import ScoreConfig, score, update_states
from glintru_rec.scoring.state_store import StateStore
from tests.conftest import environment, keys_of
from tests.encoder_laws import shake

NUM_ITEMS, WIDTH, K, NUM_USERS = 60, 16, 12, 12
ITEM_IDS = pa.array(np.arange(NUM_ITEMS)[::-1] + 2**60)
STRING_IDS = pa.array([f"item ü/{i}" for i in range(NUM_ITEMS)])
CATALOGS = {"numbers": ITEM_IDS, "strings": STRING_IDS, "other order": pa.array(np.arange(NUM_ITEMS) + 2**60)}
FIRST_USER = 2**61  # a float64 would round all of these ids to one

ENCODERS = {
    "glint_ru": lambda: GlintRU(WIDTH),
    "glint_ru_2": lambda: GlintRU(WIDTH, num_blocks=2),
    "no_gru": lambda: GlintRU(WIDTH, gru_expert=False, num_blocks=2),
    "no_attention": lambda: GlintRU(WIDTH, attention_expert=False, selective_gate=False, kernel_size=1),
    "rec_grela": lambda: RecGRELA(WIDTH, num_blocks=2, num_heads=2),
    "lru_rec": lambda: LRURec(WIDTH),
    "ensemble": lambda: Ensemble([GlintRU(WIDTH // 2), LRURec(WIDTH // 2)]),
    "bidirectional": lambda: GlintRU(WIDTH, causal=False),
    "sasrec": lambda: SASRec(WIDTH),
}
RECURRENT = ("glint_ru", "glint_ru_2", "rec_grela", "lru_rec", "ensemble")
ABLATED = ("no_gru", "no_attention")


class PlainTable(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(NUM_ITEMS, width)

    def forward(self, item_ids, more_ids):
        return self.embedding(item_ids), self.embedding(more_ids)


@functools.cache
def make_model(name, seed=0, similarity="dot"):
    """``similarity`` may be ``bias``: the dot product and a bias for each item."""
    torch.manual_seed(seed)
    item_bias = similarity == "bias"
    table = PlainTable(WIDTH + item_bias)
    model = SequenceModel(table, ENCODERS[name](), "dot" if item_bias else similarity, item_bias).eval()
    shake(model.encoder, 0.1)
    return model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Make artifacts, each once."""

    @functools.cache
    def make(name="glint_ru", seed=0, similarity="dot", ids="numbers"):
        model = make_model(name, seed, similarity)
        folder = tmp_path_factory.mktemp("artifact") / name
        vocabulary = Vocabulary(CATALOGS[ids], np.ones(NUM_ITEMS, dtype=np.int64))
        export_artifact(
            model.encoder,
            model.similarity,
            model.table.embedding.weight,
            vocabulary,
            folder,
            max_seq_len=200,
            encoder_config={"encoder": name},
            provenance={},
        )
        return str(folder)

    return make


@pytest.fixture(autouse=True, scope="module")
def updates_are_fast():
    """There are hundreds here. Models are loaded once, and nobody cuts the power: the disk need not be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "load", functools.cache(Artifact.load))
        patch.setattr(os, "fsync", lambda _: None)
        yield


def make_events(seed=0, num_users=NUM_USERS, longest=30):
    """Users, item indices and times in the order of time; the steps between times are 0, 1 or 2, so there are ties."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.repeat(np.arange(num_users), rng.integers(1, longest, num_users)))
    times = np.cumsum(rng.integers(0, 3, len(users)))
    items = rng.integers(NUM_ITEMS, size=len(users))
    _, first = np.unique(np.stack([users, items, times]), axis=1, return_index=True)  # no event twice
    keep = np.sort(first)
    return users[keep], items[keep], times[keep]


def write_events(path, users, items, times, item_ids=ITEM_IDS, user_ids=None):
    users = np.asarray(users) + FIRST_USER if user_ids is None else user_ids.take(pa.array(users))
    names = item_ids.take(pa.array(items))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users, "item_id": names, "timestamp": np.asarray(times)}), path)
    return str(path)


def config(folder, artifact_path, number, **changes):
    options = {"artifact": artifact_path, "input": str(folder / f"{number}.parquet"), "output": str(folder / f"out-{number}")}
    return ScoreConfig(**options | {"mode": "update", "state": str(folder / "state"), "top_k": K, "batch_size": 5} | changes)


def read(path):
    return pq.read_table(path, partitioning=None)


def store_rows(folder):
    with sqlite3.connect(Path(folder) / "states.sqlite") as db:
        return db.execute("SELECT * FROM user_state ORDER BY user_id").fetchall()


@torch.no_grad()
def afresh(model, history, exclude_seen=True):
    """The scores of the whole catalog after a whole history, by the eager model."""
    item_ids = torch.tensor(history)
    query = model.encode(item_ids, offsets_from_lengths(torch.tensor([len(history)])), item_ids[:0])[0]
    scores = (query @ model.item_vectors(model.table.embedding.weight).t())[0].numpy()
    if exclude_seen:
        scores[history] = -np.inf
    return scores


def check_output(output, model, histories, acted, exclude_seen=True):
    """Exactly those who acted, in ascending order, each with the best K of a scoring afresh."""
    table = read(output / "part-00000.parquet")
    assert table["user_id"].to_pylist() == [user + FIRST_USER for user in sorted(acted)]
    index = {item: i for i, item in enumerate(ITEM_IDS.to_pylist())}
    for row in table.to_pylist():
        truth = afresh(model, histories[row["user_id"] - FIRST_USER], exclude_seen)
        best = np.sort(truth[np.isfinite(truth)])[::-1][:K]
        np.testing.assert_allclose(row["scores"], best, rtol=0, atol=1e-5)
        np.testing.assert_allclose([truth[index[item]] for item in row["item_ids"]], best, rtol=0, atol=1e-5)
        assert len(set(row["item_ids"])) == len(best)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_log_cut_at_fifty_random_places_gives_what_scoring_afresh_gives(name, artifact, tmp_path):
    path, model = artifact(name), make_model(name)
    users, items, times = make_events(longest=40)
    cuts = np.sort(np.random.default_rng(1).choice(np.arange(1, len(users)), size=50, replace=False))
    histories = [[] for _ in range(NUM_USERS)]
    for number, part in enumerate(np.split(np.arange(len(users)), cuts)):
        write_events(tmp_path / f"{number}.parquet", users[part], items[part], times[part])
        report = update_states(config(tmp_path, path, number))
        for user, item in zip(users[part], items[part]):
            histories[user].append(item)
        check_output(tmp_path / f"out-{number}", model, histories, set(users[part].tolist()))
        assert report.events_applied == report.rows_in == len(part)

    write_events(tmp_path / "whole" / "0.parquet", users, items, times)
    update_states(config(tmp_path / "whole", path, 0))
    check_output(tmp_path / "whole" / "out-0", model, histories, set(users.tolist()))
    check_stores(tmp_path / "state", tmp_path / "whole" / "state")


@pytest.mark.parametrize("batch_size", [1, 1024])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_batches_similarities_and_seen_items(batch_size, similarity, exclude_seen, artifact, tmp_path):
    path, model = artifact(similarity=similarity), make_model("glint_ru", similarity=similarity)
    users, items, times = make_events(seed=3)
    histories = [items[users == user].tolist() for user in range(NUM_USERS)]
    parts = np.array_split(np.arange(len(users)), 2)
    for number, part in enumerate(parts):
        write_events(tmp_path / f"{number}.parquet", users[part], items[part], times[part])
        update_states(config(tmp_path, path, number, batch_size=batch_size, exclude_seen=exclude_seen))
    check_output(tmp_path / "out-1", model, histories, set(users[parts[1]].tolist()), exclude_seen)


def test_order_of_rows_does_not_matter_but_where_times_are_equal(artifact, tmp_path):
    users, items, times = make_events(seed=4)
    order = np.random.default_rng(0).permutation(len(users))
    order = order[np.argsort(times[order] // 100, kind="stable")]
    order = np.array(sorted(order, key=lambda row: (users[row] % 3, -users[row], times[row], row)))  # ties keep their order
    write_events(tmp_path / "0.parquet", users, items, times)
    write_events(tmp_path / "other" / "0.parquet", users[order], items[order], times[order])
    update_states(config(tmp_path, artifact(), 0))
    update_states(config(tmp_path / "other", artifact(), 0))
    check_stores(tmp_path / "state", tmp_path / "other" / "state")


def events_of(folder, number, rows):
    users, items, times = zip(*rows)
    return write_events(folder / f"{number}.parquet", users, items, times)


def reject_rows(output):
    path = output / "rejects" / "part-00000.parquet"
    return [(row["user_id"], row["reason"], row["row"]) for row in read(path).to_pylist()] if path.exists() else []


def test_late_events_and_repeated_ones_are_set_aside(artifact, tmp_path):
    name = str(FIRST_USER)
    events_of(tmp_path, 0, [(0, 5, 10), (0, 6, 20), (0, 7, 20)])
    events_of(
        tmp_path,
        1,
        [
            (0, 8, 30),
            (0, 9, 19),  # late
            (0, 7, 20),  # was applied at this very time
            (0, 5, 20),  # at the newest time, but another event: applied, after those before it
            (0, 8, 30),  # twice in one input
            (1, 3, -5),  # another user's times are another matter
        ],
    )
    update_states(config(tmp_path, artifact(), 0))
    report = update_states(config(tmp_path, artifact(), 1))
    assert (report.rows_in, report.events_applied, report.unknown_items) == (6, 3, 0)
    assert report.rows_set_aside == {"duplicate_event": 2, "late_event": 1}
    assert reject_rows(tmp_path / "out-1") == [
        (name, "late_event", 2),
        (name, "duplicate_event", 3),
        (name, "duplicate_event", 5),
    ]
    reject = read(tmp_path / "out-1" / "rejects" / "part-00000.parquet").to_pylist()[0]
    assert (reject["item_id"], reject["timestamp"]) == (str(ITEM_IDS[9].as_py()), "19")
    assert reject["fragment"] == str(tmp_path / "1.parquet")
    check_output(tmp_path / "out-1", make_model("glint_ru"), [[5, 6, 7, 5, 8], [3]], {0, 1})
    assert [(row[0] - FIRST_USER, row[1], row[2]) for row in store_rows(tmp_path / "state")] == [(0, 30, 5), (1, -5, 1)]


def test_inputs_may_overlap(artifact, tmp_path):
    users, items, times = make_events(seed=5)
    third = len(users) // 3
    for number, part in enumerate([slice(0, 2 * third), slice(third, None), slice(None)]):
        write_events(tmp_path / f"{number}.parquet", users[part], items[part], times[part])
        report = update_states(config(tmp_path, artifact(), number))
    assert report.events_applied == report.users_updated == 0
    assert set(report.rows_set_aside) == {"duplicate_event", "late_event"}
    assert len(read(tmp_path / "out-2" / "part-00000.parquet")) == 0
    write_events(tmp_path / "whole" / "0.parquet", users, items, times)
    update_states(config(tmp_path / "whole", artifact(), 0))
    check_stores(tmp_path / "state", tmp_path / "whole" / "state")


def test_unknown_items_and_unusable_rows(artifact, tmp_path):
    known = ITEM_IDS[4].as_py()
    columns = {
        "user_id": pa.array([7, None, 7, 7, 8, 7, -1]),
        "item_id": pa.array([known, known, None, known, 999, 12345, known]),
        "timestamp": pa.array([10, 1, 2, None, 50, 99, 5]),
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    report = update_states(config(tmp_path, artifact(), 0))
    assert (report.rows_in, report.events_applied, report.unknown_items, report.users_updated) == (7, 1, 2, 1)
    assert report.rows_set_aside == {"negative_user": 1, "null_item": 1, "null_timestamp": 1, "null_user": 1}
    assert [row[:3] for row in store_rows(tmp_path / "state")] == [(7, 10, 1)]  # no user 8; the unknown item moved no time
    assert read(tmp_path / "out-0" / "part-00000.parquet")["user_id"].to_pylist() == [7]
    assert json.loads((tmp_path / "out-0" / "report.json").read_text())["unknown_items"] == 2
    assert (tmp_path / "out-0" / "_SUCCESS").exists()


def test_string_ids(artifact, tmp_path):
    user_ids = pa.array([f"u {i} é" for i in range(NUM_USERS)])
    path, model = artifact(ids="strings"), make_model("glint_ru")
    users, items, times = make_events(seed=6)
    for number, part in enumerate(np.array_split(np.arange(len(users)), 2)):
        write_events(tmp_path / f"{number}.parquet", users[part], items[part], times[part], STRING_IDS, user_ids)
        update_states(config(tmp_path, path, number))
    out = read(tmp_path / "out-1" / "part-00000.parquet")
    assert out["user_id"].to_pylist() == sorted({f"u {user} é" for user in users[part]})
    for row in out.to_pylist():
        truth = np.sort(afresh(model, items[users == int(row["user_id"].split()[1])].tolist()))[::-1]
        np.testing.assert_allclose(row["scores"], truth[:K], rtol=0, atol=1e-5)
        assert all(item.startswith("item ü/") for item in row["item_ids"])


def test_timestamps_are_times_too(artifact, tmp_path):
    days = pa.array([3, 1, 2], pa.int32()).cast(pa.date32()).cast(pa.timestamp("ms"))
    columns = {"user_id": pa.array([1, 1, 1]), "item_id": ITEM_IDS[:3], "timestamp": days}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    update_states(config(tmp_path, artifact(), 0))
    (row,) = store_rows(tmp_path / "state")
    assert row[:3] == (1, 3 * 86_400_000_000, 3)
    refused(config(tmp_path, artifact(), "1"), tmp_path, "times are as_given, those of state .* are microseconds")


EVENT = st.tuples(
    st.one_of(st.none(), st.integers(-1, 3)),
    st.one_of(st.none(), st.sampled_from([-1, 999, *ITEM_IDS.to_pylist()[:3]])),
    st.one_of(st.none(), st.integers(0, 4)),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(EVENT, min_size=1, max_size=10), min_size=1, max_size=3), st.integers(1, 4))
def test_rows_in_are_applied_set_aside_or_unknown(artifact, inputs, batch_size):
    applied, known = 0, set(ITEM_IDS.to_pylist())
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, rows in enumerate(inputs):
            columns = [pa.array([row[i] for row in rows], pa.int64()) for i in range(3)]
            pq.write_table(pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns))), folder / f"{number}.parquet")
            report = update_states(config(folder, artifact(), number, batch_size=batch_size))
            assert report.rows_in == len(rows)
            assert report.rows_in == report.events_applied + sum(report.rows_set_aside.values()) + report.unknown_items
            assert len(reject_rows(folder / f"out-{number}")) == sum(report.rows_set_aside.values())
            assert len(read(folder / f"out-{number}" / "part-00000.parquet")) == report.users_updated
            applied += report.events_applied
        rows = store_rows(folder / "state")
    assert sum(row[2] for row in rows) == applied
    usable = {row for rows in inputs for row in rows if None not in row and row[0] >= 0 and row[1] in known}
    assert applied <= len(usable)
    assert {row[0] for row in rows} == {row[0] for row in usable}
    assert len(inputs) > 1 or applied == len(usable)


def check_stores(folder, other):
    """The same users, times, counts, items, and to 1e-5 the same states."""
    ours, theirs = store_rows(folder), store_rows(other)
    assert [(*row[:3], *row[4:]) for row in ours] == [(*row[:3], *row[4:]) for row in theirs]
    for row, same in zip(ours, theirs):
        np.testing.assert_allclose(np.frombuffer(row[3], "<f4"), np.frombuffer(same[3], "<f4"), rtol=1e-5, atol=1e-5)


def refused(arguments, folder, message):
    """One clear error, and neither the store nor the output has changed."""
    if not Path(arguments.input).exists():
        events_of(folder, Path(arguments.input).stem, [(0, 1, 10**9)])
    before = store_rows(folder / "state") if (folder / "state" / "states.sqlite").exists() else None
    with pytest.raises(InputError, match=message):
        update_states(arguments)
    assert before is None or store_rows(folder / "state") == before
    assert not Path(arguments.output).exists()
    assert not list(folder.glob(".partial*"))


class TestRefused:
    @pytest.mark.parametrize("name", ["bidirectional", "sasrec"])
    def test_encoder_without_a_recurrent_form(self, name, artifact, tmp_path):
        refused(config(tmp_path, artifact(name), 0), tmp_path, f"needs an encoder with a recurrent form: {name} of artifact")
        assert not (tmp_path / "state").exists()
        assert "step" not in json.loads((Path(artifact(name)) / "manifest.json").read_text())["signature"]

    def test_states_of_another_model_or_vocabulary(self, artifact, tmp_path):
        events_of(tmp_path, 0, [(0, 1, 10)])
        update_states(config(tmp_path, artifact(), 0))
        refused(config(tmp_path, artifact(seed=1), 1), tmp_path, "states of another model")
        refused(config(tmp_path, artifact("lru_rec"), 1), tmp_path, "states of another model")
        refused(config(tmp_path, artifact(ids="other order"), 1), tmp_path, "states of another model")

    def test_ids_of_another_type(self, artifact, tmp_path):
        events_of(tmp_path, 0, [(0, 1, 10)])
        update_states(config(tmp_path, artifact(), 0))
        write_events(tmp_path / "1.parquet", [0], [1], [11], user_ids=pa.array(["u"]))
        refused(config(tmp_path, artifact(), 1), tmp_path, "users are string, those of state .* are int64")
        write_events(tmp_path / "2.parquet", [0], [0], [11], item_ids=pa.array(["i"]))
        refused(config(tmp_path, artifact(), 2), tmp_path, "holds string ids, the artifact's vocabulary int64")

    def test_a_store_in_use(self, artifact, tmp_path):
        events_of(tmp_path, 1, [(0, 1, 10)])
        update_states(config(tmp_path, artifact(), 1))
        model = Artifact.load(artifact()).fingerprint
        with StateStore(tmp_path / "state", model):
            refused(config(tmp_path, artifact(), 0), tmp_path, "is being updated by another process")
        update_states(config(tmp_path, artifact(), 0))

    def test_no_store(self, artifact, tmp_path):
        (tmp_path / "file").write_text("")
        refused(config(tmp_path, artifact(), 0, state=str(tmp_path / "file")), tmp_path, "file' cannot be written")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "states.sqlite").write_text("not a database, but long enough to look for a header in it" * 20)
        refused(config(tmp_path, artifact(), 0, state=str(tmp_path / "folder")), tmp_path, "folder' cannot be used")

    def test_input(self, artifact, tmp_path):
        (tmp_path / "1.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
        refused(config(tmp_path, artifact(), 0, input=str(tmp_path / "1.csv")), tmp_path, "is csv; .* parquet files only")
        refused(config(tmp_path, artifact(), 0, time_column="when"), tmp_path, "has no column 'when'")
        nothing = np.array([], np.int64)
        write_events(tmp_path / "2.parquet", nothing, nothing, nothing)
        refused(config(tmp_path, artifact(), 2), tmp_path, "holds no rows")

    def test_an_artifact_of_before(self, artifact, tmp_path):
        old = shutil.copytree(artifact(), tmp_path / "old")
        manifest = json.loads((old / "manifest.json").read_text())
        for method in ("top_k_of", "init_state", "step", "advance"):
            del manifest["signature"][method]
        (old / "manifest.json").write_text(json.dumps(manifest))
        refused(config(tmp_path, str(old), 0), tmp_path, "is of a version without states; export it again")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": ""}, "state is ''; it must be the folder of the user states"),
            ({"mode": "top_k"}, "state is 's'; it must be left out, as mode 'top_k' keeps no states"),
            ({"item_column": "User_id"}, "user_column, item_column, time_column is .* three different names"),
        ],
    )
    def test_config(self, changes, message):
        with pytest.raises(InputError, match=message):
            ScoreConfig(**{"artifact": "a", "input": "i", "output": "o", "mode": "update", "state": "s"} | changes)

    def test_scoring_histories_is_something_else(self, artifact, tmp_path):
        with pytest.raises(InputError, match=r"for update, call update_states\(\)"):
            score(config(tmp_path, artifact(), 0))


def test_the_program_says_what_became_of_every_row(artifact, tmp_path, capsys):
    events_of(tmp_path, 0, [(0, 1, 10), (1, 2, 10), (0, 1, 10)])
    pairs = [f"{key}={value}" for key, value in keys_of(config(tmp_path, artifact(), 0)).items()]
    arguments = [pair for pair in pairs if pair.split("=")[0] in ("artifact", "input", "output", "mode", "state", "top_k")]
    score_program(compose("score", ScoreConfig, arguments))
    lines = capsys.readouterr().out
    for line in ("rows in 3, applied 2", "set aside: duplicate_event 1", "users updated 2", f"written: {tmp_path / 'out-0'}"):
        assert line in lines
    assert (tmp_path / "out-0" / "config.yaml").exists()


def test_an_error_on_the_way_changes_nothing(artifact, tmp_path, monkeypatch):
    events_of(tmp_path, 0, [(user, 1, 10) for user in range(9)])
    update_states(config(tmp_path, artifact(), 0))
    with monkeypatch.context() as patch:
        patch.setattr("glintru_rec.scoring.update.write_json", lambda *_: 1 / 0)
        events_of(tmp_path, 1, [(user, 2, 20) for user in range(9)])
        before = store_rows(tmp_path / "state")
        with pytest.raises(ZeroDivisionError):
            update_states(config(tmp_path, artifact(), 1))
        assert store_rows(tmp_path / "state") == before
        assert not list(tmp_path.glob(".partial*"))
    assert update_states(config(tmp_path, artifact(), 1)).users_updated == 9


def test_an_error_after_the_commit_keeps_the_output(artifact, tmp_path, monkeypatch):
    events_of(tmp_path, 0, [(0, 1, 10)])
    with monkeypatch.context() as patch:
        patch.setattr("glintru_rec.scoring.update.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update_states(config(tmp_path, artifact(), 0))
    (aside,) = tmp_path.glob(".partial*")
    assert (aside / "_SUCCESS").exists()
    (tmp_path / "out-0").mkdir()
    (tmp_path / "out-0" / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"left its output in .*; remove it or name another"):
        update_states(config(tmp_path, artifact(), 0))
    shutil.rmtree(tmp_path / "out-0")
    assert update_states(config(tmp_path, artifact(), 0)).events_applied == 1
    assert (tmp_path / "out-0" / "_SUCCESS").exists()
    assert len(store_rows(tmp_path / "state")) == 1


def test_a_complete_update_repeated_changes_nothing_and_other_outputs_are_safe(artifact, tmp_path):
    events_of(tmp_path, 0, [(0, 1, 10)])
    report = update_states(config(tmp_path, artifact(), 0))
    before = store_rows(tmp_path / "state")
    assert update_states(config(tmp_path, artifact(), 0)) == report
    for changes in ({"top_k": 3}, {"input": events_of(tmp_path, 1, [(0, 1, 11)])}):
        with pytest.raises(InputError, match="out-0' exists and is not an empty folder"):
            update_states(config(tmp_path, artifact(), 0, **changes))
    assert store_rows(tmp_path / "state") == before


# Forks a process for every trial, so that each starts at once, and kills it.
KILLER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from glintru_rec.scoring import ScoreConfig, update, update_states
from glintru_rec.scoring.state_store import StateStore

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def arrange(where):
    write, publish = StateStore.write, update.publish
    def write_and_die(store, users, states):
        store._db.execute("PRAGMA cache_size = 1")  # what is written reaches the file before the commit
        write(store, users, states)
        store.written = getattr(store, "written", 0) + 1
        if store.written == 2:
            die()
    def publish_and_die(*arguments):
        publish(*arguments)
        die()
    if where == "between writes":
        StateStore.write = write_and_die
    elif where == "before commit":
        StateStore.commit = die
    elif where == "after commit":
        update.publish = die
    elif where == "after all":
        update.publish = publish_and_die

def run(config, where, delay):
    child = os.fork()
    if child == 0:
        try:
            arrange(where)
            update_states(ScoreConfig(**config))
        finally:
            os._exit(0)
    time.sleep(delay)
    if where == "anywhere":
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

trials = json.load(sys.stdin)
start = time.monotonic()
assert not run(trials[0][0], "nowhere", 0)
duration = time.monotonic() - start
print(json.dumps([run(config, where, share * duration) for config, where, share in trials[1:]]))
"""

MOMENTS = ["between writes", "before commit", "after commit", "after all"]


@pytest.mark.programs
def test_killed_updates_run_again_give_what_an_undisturbed_one_gives(artifact, tmp_path):
    users, items, times = make_events(seed=7, num_users=40)
    early, late = np.array_split(np.arange(len(users)), 2)
    write_events(tmp_path / "0.parquet", users[early], items[early], times[early])
    update_states(config(tmp_path, artifact(), 0))
    before = store_rows(tmp_path / "state")
    users, items, times = (np.append(column[late], column[:2]) for column in (users, items, times))  # and two that are late
    write_events(tmp_path / "1.parquet", users, items, times)

    moments = [*MOMENTS, *["anywhere"] * 16]
    shares = np.random.default_rng(0).uniform(0.1, 1, len(moments))
    trials = []
    for number, (where, share) in enumerate(zip(["nowhere", *moments], [0.0, *shares])):
        folder = tmp_path / f"trial-{number}"
        shutil.copytree(tmp_path / "state", folder / "state")
        trials.append((config(folder, artifact(), 1, input=str(tmp_path / "1.parquet")), where, share))
    arguments = json.dumps([(keys_of(each), where, share) for each, where, share in trials])
    killer = subprocess.run(
        [sys.executable, "-c", KILLER], input=arguments, capture_output=True, text=True, check=True, env=environment()
    )
    killed = json.loads(killer.stdout)
    assert all(killed[: len(MOMENTS)])
    assert sum(killed[len(MOMENTS) :]) >= 5

    whole = tmp_path / "trial-0"
    after, report = store_rows(whole / "state"), without_times(whole)
    changed = []
    for number, (each, where, _) in enumerate(trials[1:], start=1):
        folder = tmp_path / f"trial-{number}"
        if where == "between writes":
            assert (folder / "state" / "states.sqlite-journal").stat().st_size > 0
        rows = store_rows(folder / "state")
        assert [row[:3] for row in rows] in ([row[:3] for row in before], [row[:3] for row in after])
        changed.append([row[:3] for row in rows] == [row[:3] for row in after])
        assert changed[-1] or not Path(each.output).exists()
        update_states(each)
        check_stores(folder / "state", whole / "state")
        assert without_times(folder) == report
        for name in ("part-00000.parquet", "rejects/part-00000.parquet"):
            ours, theirs = (read(Path(output) / name) for output in (each.output, trials[0][0].output))
            assert ours.drop_columns(["scores"] if name[0] == "p" else []) == theirs.drop_columns(
                ["scores"] if name[0] == "p" else []
            )
        scores = (
            read(Path(output) / "part-00000.parquet")["scores"].to_pylist() for output in (each.output, trials[0][0].output)
        )
        for ours, theirs in zip(*scores):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert changed[: len(MOMENTS)] == [False, False, True, True]


def without_times(folder):
    report = json.loads((folder / "out-1" / "report.json").read_text())
    return {name: report[name] for name in report if name not in ("seconds", "rows_per_second", "config")}


# Runs where the package and its dependencies cannot be imported.
FRESH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("glintru_rec", "torchrec", "fbgemm_gpu", "pyarrow", "numpy.typing"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch

torch.set_num_threads(1)
item_ids, lengths = torch.load("histories.pt")
ends = lengths.cumsum(0)
outputs = {}
for path in sys.argv[1:]:
    module = torch.jit.load(f"{path}/model.pt")
    module.open_items(path)
    state = module.init_state(len(lengths))
    stepped, _ = module.advance(item_ids[:0], torch.zeros_like(lengths), state)  # of those who have no event
    for n in range(int(lengths.max())):  # one event at a time, of those who have one
        rows = (lengths > n).nonzero().squeeze(1)
        stepped[rows], state[rows] = module.step(item_ids[(ends - lengths)[rows] + n], state[rows])
    query, advanced = module.advance(item_ids, lengths, module.init_state(len(lengths)))
    outputs[path] = stepped, state, query, advanced
torch.save(outputs, "outputs.pt")
"""


@pytest.mark.programs
def test_steps_without_the_package_give_the_query_of_the_whole_history(artifact, tmp_path):
    lengths = torch.tensor([3, 0, 41, 1, 150])
    item_ids = torch.randint(NUM_ITEMS, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    torch.save((item_ids, lengths), tmp_path / "histories.pt")
    models = {artifact(name): make_model(name) for name in RECURRENT + ABLATED}
    for similarity in ("cosine", "bias"):
        models[artifact(similarity=similarity)] = make_model("glint_ru", similarity=similarity)
    subprocess.run([sys.executable, "-I", "-c", FRESH, *models], cwd=tmp_path, check=True)
    for path, outputs in torch.load(tmp_path / "outputs.pt").items():
        model = models[path]
        with torch.no_grad():
            truth = model.encode(item_ids, offsets_from_lengths(lengths), item_ids[:0])[0]
        stepped, state, query, advanced = outputs
        torch.testing.assert_close(stepped, truth, rtol=0, atol=1e-5)
        torch.testing.assert_close(query, truth, rtol=0, atol=1e-5)
        torch.testing.assert_close(advanced, state, rtol=1e-5, atol=1e-5)
        assert state.shape[1] == model.encoder.state_size


@pytest.mark.parametrize("name", RECURRENT + ABLATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_sequences", [0, 1, 5])
def test_packed_states_come_back_to_the_last_bit(name, dtype, num_sequences):
    encoder = ENCODERS[name]().to(dtype)
    generator = torch.Generator().manual_seed(0)
    state = type(encoder.init_state(0))(
        *(
            torch.randint(2**47, part.shape, generator=generator)
            if part.dtype == torch.int64
            else torch.randn(part.shape, generator=generator, dtype=dtype)
            for part in encoder.init_state(num_sequences)
        )
    )
    packed = encoder.pack_state(state)
    assert packed.shape == (num_sequences, encoder.state_size)
    assert packed.dtype == dtype
    for part, same in zip(state, encoder.unpack_state(packed), strict=True):
        assert torch.equal(part, same)
        assert part.dtype == same.dtype


@pytest.mark.parametrize("position", [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**40 + 12345, 2**48 - 1])
def test_a_position_of_any_size_is_kept_exactly(position):
    encoder = ENCODERS["rec_grela"]()
    state = encoder.init_state(1)
    state = RecGRELAState(state.memory, state.key_sums, state.recent, torch.tensor([position]))
    assert encoder.unpack_state(encoder.pack_state(state)).position.tolist() == [position]


def test_an_encoder_without_a_recurrent_form_has_no_state():
    for name in ("bidirectional", "sasrec"):
        assert not ENCODERS[name]().recurrent
        assert ENCODERS[name]().state_size == 0
    for name in RECURRENT + ABLATED:
        assert ENCODERS[name]().recurrent
