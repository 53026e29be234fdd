"""Days appended one by one give what preparing all of them at once gives; what had an index keeps it."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import glintru_rec.data.writing as writing
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.errors import InputError
from tests.conftest import SMALL, run_program


def run(log, output, **options) -> dict:
    return prepare(PrepareConfig(str(log), str(output), **options), progress=lambda message: None).manifest


def write_day(path, rows, id_type=None, **columns) -> None:
    path.parent.mkdir(exist_ok=True)
    user, item, time = zip(*rows)
    columns = {"user_id": pa.array(user, id_type), "item_id": pa.array(item, id_type), "timestamp": pa.array(time), **columns}
    pq.write_table(pa.table(columns), path)


def rows_of(dataset) -> list[dict]:
    """Users in order, with original item ids, times and positions."""
    ids = pq.read_table(dataset / "vocabulary/items.parquet")["item_id"].to_pylist()
    parts = [part["file"] for part in json.loads((dataset / "manifest.json").read_text())["parts"]]
    rows = [row for part in parts for row in pq.read_table(dataset / part).to_pylist()]
    return [{**row, "items": [ids[index] for index in row["items"]]} for row in rows]


def catalog(dataset) -> dict:
    table = pq.read_table(dataset / "vocabulary/items.parquet")
    return dict(zip(table["item_id"].to_pylist(), table["count"].to_pylist()))


# Few users, items and times: ties, repeats across days, late events, and keys that are rare until a later day.
EVENTS = st.tuples(st.sampled_from([0, 0, 1, 1, 2, 3, 4, None]), st.sampled_from([0, 0, 1, 1, 2, 3, 4, -1]), st.integers(-2, 5))
DAYS = st.lists(st.lists(EVENTS, min_size=1, max_size=30), min_size=2, max_size=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(days=DAYS, least_user=st.integers(1, 4), least_item=st.integers(1, 4), as_text=st.booleans())
def test_any_cuts_give_the_same_dataset(tmp_path_factory, days, least_user, least_item, as_text):
    tmp_path = tmp_path_factory.mktemp("grow")
    id_type = pa.string() if as_text else pa.int64()
    days[0] += [(9, 9, time) for time in range(4)]  # so that there is something to append to
    for number, rows in enumerate(days):
        if as_text:
            rows = [(None if user is None else f"u{user}", "" if item == -1 else f"i{item}", time) for user, item, time in rows]
        write_day(tmp_path / f"log/day-{number}.parquet", rows, id_type)
    filters = {"min_user_events": least_user, "min_item_events": least_item}
    run(tmp_path / "log/day-0.parquet", tmp_path / "grown-0", **filters)
    for number in range(1, len(days)):
        base = str(tmp_path / f"grown-{number - 1}")
        grown = run(tmp_path / f"log/day-{number}.parquet", tmp_path / f"grown-{number}", base=base, **filters)
        before, after = list(catalog(tmp_path / f"grown-{number - 1}")), list(catalog(tmp_path / f"grown-{number}"))
        assert after[: len(before)] == before
        assert grown["growth"]["new_items"] == len(after) - len(before)
    at_once = run(tmp_path / "log", tmp_path / "at-once", **filters)
    last = tmp_path / f"grown-{len(days) - 1}"
    assert rows_of(last) == rows_of(tmp_path / "at-once")
    assert catalog(last) == catalog(tmp_path / "at-once")
    for name in ("rare.parquet", "set_aside.parquet"):
        assert pq.read_table(last / name) == pq.read_table(tmp_path / "at-once" / name)
    differ = {"vocabulary_sha256", "growth"}
    assert {key: grown[key] for key in grown.keys() - differ} == {key: at_once[key] for key in at_once.keys() - differ}
    SequenceDataset.open(last)


def test_what_a_new_day_changes_is_counted(tmp_path):
    """User 1 and item 10 are in the base; user 2 and item 20 were too rare for it, and come back."""
    first = [(1, 10, 5), (1, 10, 7), (1, 20, 6), (2, 10, 5), (2, 10, 5)]
    second = [
        (1, 10, 5),  # the base has it
        (1, 20, 6),  # the base had set it aside as rare
        (2, 20, 3),  # older than what user 2 has, which is an event again
        (1, 20, 1),  # older than what user 1 has
        (1, 30, 9),  # a rare item
        (2, 20, 5),  # as old as an earlier event: behind it
        (None, 1, 1),
    ]
    write_day(tmp_path / "log/1", first)
    write_day(tmp_path / "log/2", second)
    base = run(tmp_path / "log/1", tmp_path / "base", min_user_events=2, min_item_events=2)
    assert rows_of(tmp_path / "base") == [{"user_id": 1, "items": [10, 10], "timestamps": [5, 7], "positions": [0, 1]}]
    assert base["set_aside"] == {"duplicate_event": 1, "rare_user": 1, "rare_item": 1}
    assert pq.read_table(tmp_path / "base/rare.parquet").to_pylist() == [
        {"position": 2, "user_id": 1, "item_id": 20, "timestamp": 6},
        {"position": 3, "user_id": 2, "item_id": 10, "timestamp": 5},
    ]
    grown = run(tmp_path / "log/2", tmp_path / "grown", base=str(tmp_path / "base"), min_user_events=2, min_item_events=2)
    assert rows_of(tmp_path / "grown") == [
        {"user_id": 1, "items": [20, 10, 20, 10], "timestamps": [1, 5, 6, 7], "positions": [8, 0, 2, 1]},
        {"user_id": 2, "items": [20, 10, 20], "timestamps": [3, 5, 5], "positions": [7, 3, 10]},
    ]
    assert list(catalog(tmp_path / "grown").items()) == [(10, 3), (20, 4)]  # the index stays, whatever the count
    assert grown["set_aside"] == {"duplicate_event": 3, "null_user": 1, "rare_user": 0, "rare_item": 1}
    counts = {"new_events": 3, "late_events": 2, "returned_events": 2, "new_users": 1, "new_items": 1}
    assert grown["growth"] == {
        "base": str(tmp_path / "base"),
        "base_vocabulary_sha256": base["vocabulary_sha256"],
        **counts,
    }
    assert grown["rows_in"] == 12
    assert [file["path"] for file in grown["source"]["files"]] == [str(tmp_path / "log/1"), str(tmp_path / "log/2")]


def test_parts_follow_the_grown_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVENTS_PER_PART", 100)
    rng = np.random.default_rng(0)
    for number in range(2):
        rows = zip(rng.integers(0, 40, 400).tolist(), rng.integers(0, 9, 400).tolist(), range(number, 400 + number))
        write_day(tmp_path / f"log/{number}", rows)
    run(tmp_path / "log/0", tmp_path / "base")
    grown = run(tmp_path / "log/1", tmp_path / "grown", base=str(tmp_path / "base"))
    run(tmp_path / "log", tmp_path / "at-once")
    assert grown["num_files"] > 5
    assert rows_of(tmp_path / "grown") == rows_of(tmp_path / "at-once")


def text_log(path, *rows) -> None:
    path.write_text("user_id,item_id,timestamp\n" + "".join(row + "\n" for row in rows))


LOOSE = {"min_user_events": 1, "min_item_events": 1}


def test_a_new_day_is_read_as_the_base_was(tmp_path):
    """Ids that look like numbers are text, and whole numbers seconds, where the base's are."""
    text_log(tmp_path / "1", "a,007,1.5", "a,7,2")
    text_log(tmp_path / "2", "b,8,3", "b,7,4")
    run(tmp_path / "1", tmp_path / "base", **LOOSE)
    run(tmp_path / "2", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    assert rows_of(tmp_path / "grown") == [
        {"user_id": "a", "items": ["007", "7"], "timestamps": [1500000, 2000000], "positions": [0, 1]},
        {"user_id": "b", "items": ["8", "7"], "timestamps": [3000000, 4000000], "positions": [2, 3]},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,5,6", r"column 'user_id' holds 'x' in '.*/2', row 2, but the dataset's ids are int64"),
        ("1,5,6.5", r"column 'timestamp' of .*/2' is microseconds, but the dataset's is as_given"),
    ],
)
def test_a_new_day_of_other_types_is_refused(tmp_path, row, message):
    text_log(tmp_path / "1", "1,2,3")
    text_log(tmp_path / "2", "1,2,4", row)
    run(tmp_path / "1", tmp_path / "base", **LOOSE)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "2", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "base"]


@pytest.mark.parametrize("as_text", [False, True])
def test_whole_numbers_of_no_known_unit_are_refused(tmp_path, as_text):
    """After a base of timestamps, in parquet or as text; dates and seconds with a fraction go on."""
    write_day(tmp_path / "log/1", [(1, 2, 3)], timestamp=pa.array([3], pa.timestamp("us")))
    write_day(tmp_path / "log/2", [(1, 2, 4)])
    if as_text:
        text_log(tmp_path / "log/2", "1,2,4")
    run(tmp_path / "log/1", tmp_path / "base", **LOOSE)
    text_log(tmp_path / "log/3", "1,2,1970-01-01 00:00:01", "1,2,1970-01-03")
    dates = run(tmp_path / "log/3", tmp_path / "dates", base=str(tmp_path / "base"), **LOOSE)
    assert rows_of(tmp_path / "dates")[0]["timestamps"] == [3, 10**6, 2 * 86_400 * 10**6]
    assert "times_were_seconds" not in dates
    text_log(tmp_path / "log/4", "1,2,4.5")
    assert run(tmp_path / "log/4", tmp_path / "seconds", base=str(tmp_path / "dates"), **LOOSE)["times_were_seconds"]
    with pytest.raises(InputError, match=r"is as_given \(whole numbers, .*; write timestamps\), but the dataset's is microsec"):
        run(tmp_path / "log/2", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)


def test_what_cannot_be_a_base(tmp_path):
    write_day(tmp_path / "log", [(1, 2, 3)])
    with pytest.raises(InputError, match=r"side_columns are \['timestamp_'\], and a base's events have none"):
        PrepareConfig("log", "out", base="base", side_columns=["timestamp_"])
    write_day(tmp_path / "side", [(1, 2, 3)], rating=[5])
    run(tmp_path / "side", tmp_path / "rated", side_columns=["rating"], **LOOSE)
    with pytest.raises(InputError, match="rated' has side features, which a log cannot be appended to yet"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "rated"), **LOOSE)
    with pytest.raises(InputError, match="is no prepared dataset"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path))
    run(tmp_path / "log", tmp_path / "base", **LOOSE)
    with pytest.raises(InputError, match="was prepared with min_user_events=1 min_item_events=1, not min_user_events=5 min_i"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"))
    rare = tmp_path / "base/rare.parquet"
    whole = rare.read_bytes()
    rare.unlink()
    with pytest.raises(InputError, match=r"has no '.*base/rare.parquet', so nothing can be appended to it"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    rare.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"base/rare.parquet' cannot be read: .*; copy or prepare the dataset again"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    rare.write_bytes(whole)
    manifest = (tmp_path / "base/manifest.json").read_text()
    for change, message in (
        ({"set_aside": {"rare_item": 2}, "rows_in": 3}, r"base/rare.parquet' holds 0 events, the manifest says 2; copy or"),
        (
            {"num_events": 3, "rows_in": 3},
            r"base/manifest.json' counts 3 events, its parts hold 1; copy or prepare the base again",
        ),
        ({"rows_in": 9}, r"base/manifest.json' counts 9 rows, but events and rows set aside add up to 1"),
    ):
        (tmp_path / "base/manifest.json").write_text(json.dumps(json.loads(manifest) | change))
        with pytest.raises(InputError, match=message):
            run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    (tmp_path / "base/manifest.json").write_text(manifest)
    part = pq.read_table(tmp_path / "base/sequences/part-00000.parquet")
    items = pa.array([[7]], pa.list_(pa.int64()))
    pq.write_table(part.set_column(1, "items", items), tmp_path / "base/sequences/part-00000.parquet")
    with pytest.raises(InputError, match=r"part-00000.parquet' holds item index 7 \(user 1, row 1\), which is not in \[0, 1\)"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    pq.write_table(pa.concat_tables([part, part]), tmp_path / "base/sequences/part-00000.parquet")
    with pytest.raises(InputError, match=r"part-00000.parquet' holds 2 users with 2 events, the manifest says 1 with 1"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)
    pq.write_table(part.drop(["positions"]), tmp_path / "base/sequences/part-00000.parquet")
    with pytest.raises(InputError, match=r"has no column 'positions' in '.*part-00000.parquet'"):
        run(tmp_path / "log", tmp_path / "grown", base=str(tmp_path / "base"), **LOOSE)


def weights(run_dir) -> dict:
    from glintru_rec.training.build import load_unsharded

    return load_unsharded(run_dir).model.state_dict()


@pytest.mark.programs
def test_a_grown_dataset_trains_on_from_the_base_run(tmp_path, dataset_dir, run_dir):
    """Rates of nothing: old items have their rows, on two ranks whose shards lie elsewhere; new ones have random rows."""
    rows = [(user, item, user) for user in range(7) for item in (9001, 9002, 9003, 9004, 500)]
    write_day(tmp_path / "log", rows)
    run(tmp_path / "log", tmp_path / "grown", base=str(dataset_dir))
    arguments = [f"output={tmp_path / 'run'}", *SMALL, "model.options.dropout=0.1", f"trainer.init_from={run_dir}"]
    rates = ["optimizer.learning_rate=1e-30", "table.learning_rate=1e-30", "trainer.max_steps=1", "trainer.seed=9"]
    run_program("train", f"data.path={tmp_path / 'grown'}", *arguments, *rates, nproc=2)
    ours, theirs = weights(tmp_path / "run"), weights(run_dir)
    (table,) = [name for name in ours if ours[name].shape != theirs[name].shape]
    assert (len(ours[table]), len(theirs[table])) == (64, 60)
    assert ours[table][:60].equal(theirs[table])
    assert ours[table][60:].std() > 0
    assert all(ours[name].equal(theirs[name]) for name in ours.keys() - {table})


@pytest.mark.programs
def test_a_dataset_of_other_items_is_refused(tmp_path, run_dir):
    write_day(tmp_path / "log", [(user, item, item) for user in range(5) for item in range(60)])
    run(tmp_path / "log", tmp_path / "other")
    arguments = [f"data.path={tmp_path / 'other'}", f"output={tmp_path / 'run'}", *SMALL, f"trainer.init_from={run_dir}"]
    result = run_program("train", *arguments, check=False)
    assert result.returncode == 2
    assert f"{run_dir} was trained on another vocabulary" in result.stderr
