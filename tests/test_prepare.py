"""Preparation against a naive loop, on real files; every row is an event or is set aside with its reason."""

import json
import os
from collections import Counter
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import glintru_rec.data.writing as writing
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, PrepareReport, prepare
from glintru_rec.errors import InputError

LOOSE = {"min_user_events": 1, "min_item_events": 1}


def run(tmp_path, input_path=None, output="out", **options) -> PrepareReport:
    config = PrepareConfig(input=str(input_path or tmp_path / "log"), output=str(tmp_path / output), **(LOOSE | options))
    return prepare(config, progress=lambda message: None)


def write_parquet(path, user, item, time, **options):
    pq.write_table(pa.table({"user_id": user, "item_id": item, "timestamp": time}), path, **options)


def sequences(tmp_path, output="out"):
    """Give what the dataset holds: {user: [(item, time), ...]}, users in order."""
    vocabulary = pq.read_table(tmp_path / output / "vocabulary/items.parquet")
    ids = dict(zip(vocabulary["index"].to_pylist(), vocabulary["item_id"].to_pylist()))
    manifest = json.loads((tmp_path / output / "manifest.json").read_text())
    rows = [row for part in manifest["parts"] for row in pq.read_table(tmp_path / output / part["file"]).to_pylist()]
    return {row["user_id"]: [(ids[i], t) for i, t in zip(row["items"], row["timestamps"], strict=True)] for row in rows}


def set_aside(tmp_path):
    rows = pq.read_table(tmp_path / "out/set_aside.parquet").to_pylist()
    return [(os.path.basename(row["file"]), row["row"], row["reason"]) for row in rows]


def naive(rows, min_user_events, min_item_events):
    """Clean, filter and sort as the documentation says, one row at a time."""
    reasons, events, seen, users, items = Counter(), [], set(), {}, {}
    for user, item, time in rows:
        if user is None:
            reasons["null_user"] += 1
        elif user < 0:
            reasons["negative_user"] += 1
        elif item is None:
            reasons["null_item"] += 1
        elif item < 0:
            reasons["negative_item"] += 1
        elif time is None:
            reasons["null_timestamp"] += 1
        elif (user, item, time) in seen:
            reasons["duplicate_event"] += 1
        else:
            seen.add((user, item, time))
            users.setdefault(user, len(users))
            items.setdefault(item, len(items))
            events.append((user, item, time))
    while True:
        before = len(events)
        counts = Counter(user for user, _, _ in events)
        reasons["rare_user"] += sum(counts[user] < min_user_events for user, _, _ in events)
        events = [event for event in events if counts[event[0]] >= min_user_events]
        counts = Counter(item for _, item, _ in events)
        reasons["rare_item"] += sum(counts[item] < min_item_events for _, item, _ in events)
        events = [event for event in events if counts[event[1]] >= min_item_events]
        if len(events) == before:
            break
    by_user = {user: [] for user in sorted({user for user, _, _ in events}, key=users.__getitem__)}
    late = 0
    for user, item, time in events:
        late += any(time < earlier for _, earlier in by_user[user])
        by_user[user].append((item, time))
    for sequence in by_user.values():
        sequence.sort(key=lambda event: event[1])  # stable: ties keep the log's order
    counts = Counter(item for _, item, _ in events)
    catalog = sorted(counts, key=lambda item: (-counts[item], items[item]))
    return by_user, catalog, +reasons, late


EVENTS = st.tuples(
    st.sampled_from([0, 1, 2, 3, 0, 1, 2, 3, -1, None]),
    st.sampled_from([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1, None]),
    st.sampled_from([*range(-2, 9), None]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(st.lists(EVENTS, min_size=1, max_size=8), st.lists(EVENTS, min_size=25, max_size=60)),
    min_user_events=st.integers(1, 3),
    min_item_events=st.integers(1, 3),
    form=st.sampled_from(["parquet", "csv", "inter"]),
)
def test_equals_the_naive_loop(tmp_path_factory, rows, min_user_events, min_item_events, form):
    tmp_path = tmp_path_factory.mktemp("law")
    columns = [list(column) for column in zip(*rows)]
    if form == "parquet":
        write_parquet(tmp_path / "log", *(pa.array(column, pa.int64()) for column in columns), row_group_size=7)
    else:
        separator, header = (
            (",", "user_id,item_id,timestamp") if form == "csv" else ("\t", "user_id:token\titem_id:token\ttimestamp:float")
        )
        lines = [separator.join("" if value is None else str(value) for value in row) for row in rows]
        (tmp_path / "log").write_text("\n".join([header, *lines]) + "\n")
    by_user, catalog, reasons, late = naive(rows, min_user_events, min_item_events)
    if not by_user:
        with pytest.raises(InputError, match="no event is left"):
            run(tmp_path, min_user_events=min_user_events, min_item_events=min_item_events)
        return
    manifest = run(tmp_path, min_user_events=min_user_events, min_item_events=min_item_events).manifest
    assert list(sequences(tmp_path).items()) == list(by_user.items())
    assert pq.read_table(tmp_path / "out/vocabulary/items.parquet")["item_id"].to_pylist() == catalog
    assert +Counter(manifest["set_aside"]) == reasons
    assert manifest["out_of_order_rows"] == late
    assert manifest["rows_in"] == len(rows) == manifest["num_events"] + sum(manifest["set_aside"].values())
    listed = Counter(reason for _, _, reason in set_aside(tmp_path))
    assert listed == Counter({name: count for name, count in reasons.items() if not name.startswith("rare")})
    assert manifest["users_too_short_to_split"] == sum(len(sequence) < 3 for sequence in by_user.values())


def test_every_reason_is_listed_with_its_row(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/a.csv").write_text(
        "user_id,item_id,timestamp\n1,10,5\n,10,5\n1,,5\n1,10,\n-1,10,5\n1,-10,5\n99999999999999999999,10,5\n"
    )
    (tmp_path / "log/b.csv").write_text(
        'user_id,item_id,timestamp\n1,9223372036854775808,5\n"",10,5\n1,"",5\n1,10,soon\n1,10,5\n1,9223372036854775807,6\n'
    )
    report = run(tmp_path)
    assert set_aside(tmp_path) == [
        ("a.csv", 2, "null_user"),
        ("a.csv", 3, "null_item"),
        ("a.csv", 4, "null_timestamp"),
        ("a.csv", 5, "negative_user"),
        ("a.csv", 6, "negative_item"),
        ("a.csv", 7, "user_beyond_int64"),
        ("b.csv", 1, "item_beyond_int64"),
        ("b.csv", 2, "empty_user"),
        ("b.csv", 3, "empty_item"),
        ("b.csv", 4, "bad_timestamp"),
        ("b.csv", 5, "duplicate_event"),
    ]
    assert sequences(tmp_path) == {1: [(10, 5), (2**63 - 1, 6)]}
    raw = pq.read_table(tmp_path / "out/set_aside.parquet").to_pylist()[9]
    assert (raw["user"], raw["item"], raw["timestamp"]) == ("1", "10", "soon")
    assert dict(report.summary_rows())["set aside: bad timestamp"] == "1"
    assert "rows in" in str(report)


def test_parquet_uint64_beyond_int64_is_set_aside(tmp_path):
    write_parquet(tmp_path / "log", [1, 1, 1], pa.array([2**63, 2**63 - 1, 7], pa.uint64()), [1, 2, 3])
    run(tmp_path)
    assert set_aside(tmp_path) == [("log", 1, "item_beyond_int64")]
    assert sequences(tmp_path) == {1: [(2**63 - 1, 2), (7, 3)]}


def test_ids_above_2_to_53_stay_apart(tmp_path):
    items = [2**53 + 1, 2**53, 2**63 - 2, 2**63 - 1]
    (tmp_path / "log").write_text("user_id,item_id,timestamp\n" + "".join(f"1,{item},{n}\n" for n, item in enumerate(items)))
    run(tmp_path)
    assert [item for item, _ in sequences(tmp_path)[1]] == items


@pytest.mark.parametrize(("text", "expected"), [(["7", "x"], ["7", "x"]), (["007", "7"], ["007", "7"]), (["7", "0"], [7, 0])])
def test_text_ids_are_whole_numbers_only_if_all_are(tmp_path, text, expected):
    (tmp_path / "log").write_text("user_id,item_id,timestamp\n" + "".join(f"u,{item},{n}\n" for n, item in enumerate(text)))
    report = run(tmp_path)
    assert [item for item, _ in sequences(tmp_path)["u"]] == expected
    assert report.manifest["user_id_type"] == "string"
    assert report.manifest["item_id_type"] == ("int64" if expected[0] == 7 else "string")


def test_parquet_strings_stay_strings(tmp_path):
    write_parquet(tmp_path / "log", pa.array(["1", "1"]).dictionary_encode(), pa.array(["2", ""]), [1, 2])
    run(tmp_path)
    assert sequences(tmp_path) == {"1": [("2", 1)]}
    assert set_aside(tmp_path) == [("log", 2, "empty_item")]


@pytest.mark.parametrize(
    ("times", "expected", "unit"),
    [
        (["3", "1"], [1, 3], "as_given"),
        (["3.0", "1e0"], [1, 3], "as_given"),
        (["9223372036854775807", "1"], [1, 2**63 - 1], "as_given"),
        (["1700000000.25", "1700000000"], [1700000000000000, 1700000000250000], "microseconds"),
        (["1970-01-01 00:00:02", "1970-01-01T01:00:01+01:00"], [1000000, 2000000], "microseconds"),
        (["1970/1/2", "1970-01-01 0:00", " 1970-01-01 01:30:00.1234567+0130"], [0, 123456, 86400000000], "microseconds"),
    ],
)
def test_times_of_text(tmp_path, times, expected, unit):
    (tmp_path / "log").write_text("user_id,item_id,timestamp\n" + "".join(f"1,{n},{time}\n" for n, time in enumerate(times)))
    report = run(tmp_path)
    assert [time for _, time in sequences(tmp_path)[1]] == expected
    assert report.manifest["time_unit"] == unit


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array([1.0, float("nan"), float("inf"), 3.0]), [1, 3]),
        (pa.array([1700000000123457.0, -5.0, 9.3e18, 2.0**62]), [-5, 1700000000123457, 2**62]),  # exact, none a fraction
        (pa.array([1.5, None, 1e300, 3.0]), [1500000, 3000000]),
        (
            pa.array([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), None, None, None], pa.timestamp("us", "Europe/Berlin")),
            [1000000],
        ),
        (pa.array([2500, None, None, None], pa.timestamp("ns")), [2]),
        (pa.array([date(1970, 1, 2), None, None, None]), [86400000000]),
        (pa.array([2**63, 5, None, None], pa.uint64()), [5]),
        (pa.array(["1970-01-01", "x", None, "y"]), [0]),
    ],
)
def test_times_of_parquet(tmp_path, times, expected):
    write_parquet(tmp_path / "log", [1] * 4, [1, 2, 3, 4], times)
    report = run(tmp_path)
    assert [time for _, time in sequences(tmp_path)[1]] == expected
    assert sum(report.manifest["set_aside"].values()) == 4 - len(expected)


def test_headerless_movielens(tmp_path):
    for name, separator in (("dat", "::"), ("data", "\t")):
        lines = [separator.join(row) + "\n" for row in (("7", "30", "5", "2"), ("7", "20", "4", "1"), ("8", "30", "3", "9"))]
        (tmp_path / name).write_text("".join(lines))
        run(tmp_path, tmp_path / name, output=f"out-{name}", user_column="u", item_column="i")
        assert sequences(tmp_path, f"out-{name}") == {7: [(20, 1), (30, 2)], 8: [(30, 9)]}


def test_csv_quotes_and_line_ends(tmp_path):
    (tmp_path / "log").write_bytes(b'\xef\xbb\xbfuser_id;item_id;timestamp\r\n"a;b";"say ""hi""";1\r\n"a;b";\xc3\xa9;2\r\n')
    run(tmp_path)
    assert sequences(tmp_path) == {"a;b": [('say "hi"', 1), ("é", 2)]}


def test_recbole_knows_no_quotes(tmp_path):
    (tmp_path / "log").write_text('item_id:token\ttimestamp:float\tuser_id:token\n"x\t1.0\tu\ny"\t2.0\tu\n')
    run(tmp_path)
    assert sequences(tmp_path) == {"u": [('"x', 1), ('y"', 2)]}


def test_paths_are_no_patterns(tmp_path):
    for folder, name, item in (("a[1]*", "log?.csv", 2), ("a1x", "log2.csv", 7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(f"user_id,item_id,timestamp\n1,{item},3\n")
    run(tmp_path, tmp_path / "a[1]*")
    assert sequences(tmp_path) == {1: [(2, 3)]}


def test_columns_may_be_named(tmp_path):
    pq.write_table(pa.table({'the "user"': [1], "Item": [2], "at": [3], "user_id": [9]}), tmp_path / "log")
    run(tmp_path, user_column='the "user"', item_column="Item", time_column="at")
    assert sequences(tmp_path) == {1: [(2, 3)]}


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_threads_change_no_byte(tmp_path, form, monkeypatch):
    # All times are equal, so the log's order decides every sequence.
    monkeypatch.setattr(writing, "EVENTS_PER_PART", 60_000)
    rng = np.random.default_rng(0)
    size = 300_000
    user, item = rng.integers(0, 3000, size), np.arange(size) % 7919
    (tmp_path / "log").mkdir()
    for n in range(2):
        half = slice(n * size // 2, (n + 1) * size // 2)
        if form == "parquet":
            write_parquet(tmp_path / f"log/{n}", user[half], item[half], np.zeros(size // 2, np.int64), row_group_size=5000)
        else:
            lines = [f"{u},{i},0\n" for u, i in zip(user[half], item[half])]
            (tmp_path / f"log/{n}").write_text("user_id,item_id,timestamp\n" + "".join(lines))
    for threads in (1, 4):
        run(tmp_path, output=f"out-{threads}", threads=threads)
    names = sorted(str(path.relative_to(tmp_path / "out-1")) for path in (tmp_path / "out-1").rglob("*") if path.is_file())
    assert sum(name.startswith("sequences/part-") for name in names) >= 4
    for name in names:
        assert (tmp_path / "out-1" / name).read_bytes() == (tmp_path / "out-4" / name).read_bytes(), name
    first = sequences(tmp_path, "out-4")
    assert list(first) == list(dict.fromkeys(user.tolist()))
    expected = dict.fromkeys(item[user == user[0]].tolist())  # a repeat at the same time is a duplicate
    assert [i for i, _ in first[user[0]]] == list(expected)


def test_ties_keep_the_order_of_files(tmp_path):
    (tmp_path / "log").mkdir()
    write_parquet(tmp_path / "log/b", [1, 1], [5, 4], [7, 7])
    write_parquet(tmp_path / "log/a", [1, 1], [9, 2], [7, 7])
    run(tmp_path)
    assert sequences(tmp_path) == {1: [(9, 7), (2, 7), (5, 7), (4, 7)]}


def test_integer_width_may_change_between_files(tmp_path):
    (tmp_path / "log").mkdir()
    write_parquet(tmp_path / "log/a", pa.array([1], pa.int32()), pa.array([1], pa.uint8()), [1])
    write_parquet(tmp_path / "log/b", pa.array([2**40], pa.int64()), pa.array([2**63 - 1], pa.uint64()), [1])
    run(tmp_path)
    assert sequences(tmp_path) == {1: [(1, 1)], 2**40: [(2**63 - 1, 1)]}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (pa.array([1.0]), "column 'user_id' of .*log' has type DOUBLE; .* cannot hold every id"),
        (pa.array([True]), "column 'user_id' of .*log' has type BOOLEAN"),
        (pa.array([b"x"]), "column 'user_id' of .*log' has type BLOB"),
        (pa.array([[1]]), "has type BIGINT\\[\\]"),
        (pa.array([datetime(2020, 1, 1)]), "has type TIMESTAMP"),
    ],
)
def test_parquet_types_that_are_no_ids(tmp_path, user, message):
    write_parquet(tmp_path / "log", user, [1], [1])
    with pytest.raises(InputError, match=message):
        run(tmp_path)


def test_csv_floats_are_no_ids(tmp_path):
    (tmp_path / "log").write_text("user_id,item_id,timestamp\n1,2,3\n1,3.0,3\n")
    with pytest.raises(InputError, match=r"'item_id' holds floats as ids \(first '3.0' in .*log', row 2\)"):
        run(tmp_path)


def test_type_changes_between_files(tmp_path):
    (tmp_path / "log").mkdir()
    write_parquet(tmp_path / "log/a", [1], [1], [1])
    write_parquet(tmp_path / "log/b", ["x"], [1], [1])
    with pytest.raises(InputError, match=r"'user_id' changes its type between files: integer in .*a', text in .*b'"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,2", "Line: 3.*Expected Number of Columns: 3 Found: 2"),
        ("1,2,3,4", "Line: 3.*Expected Number of Columns: 3"),
        ('"1,2,3', "Line: 3"),
    ],
)
def test_broken_csv_row_is_named(tmp_path, row, message):
    (tmp_path / "log").write_text(f"user_id,item_id,timestamp\n1,2,3\n{row}\n")
    with pytest.raises(InputError, match=rf"log' \(csv\) cannot be read: .*{message}"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["log"]


def test_corrupt_parquet_leaves_nothing_behind(tmp_path):
    write_parquet(tmp_path / "log", np.arange(5000), np.arange(5000), np.arange(5000))
    damaged = bytearray((tmp_path / "log").read_bytes())
    damaged[20:400] = b"x" * 380
    (tmp_path / "log").write_bytes(damaged)
    with pytest.raises(InputError, match=r"log' \(parquet\) cannot be read"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["log"]


def test_no_event_left(tmp_path):
    write_parquet(tmp_path / "log", [1, None], [2, 2], [3, 3])
    with pytest.raises(InputError, match=r"no event is left of the 2 rows .*null_user 1, rare_user 1.*min_user_events \(5\)"):
        run(tmp_path, min_user_events=5)
    (tmp_path / "log").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(InputError, match="no event is left of the 0 rows"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["log"]


def test_output_must_be_free(tmp_path):
    write_parquet(tmp_path / "log", [1], [2], [3])
    (tmp_path / "out").mkdir()
    run(tmp_path)  # an empty folder is free
    before = (tmp_path / "out/manifest.json").read_bytes()
    with pytest.raises(InputError, match="out' exists and is not an empty folder"):
        run(tmp_path)
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="log' exists and is not an empty folder"):
        run(tmp_path, output="log")
    with pytest.raises(InputError, match="cannot be written"):
        run(tmp_path, output="log/below/a/file")
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    write_parquet(tmp_path / "log", [1], [2], [3])

    def interrupt(message):
        if "wrote" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig(str(tmp_path / "log"), str(tmp_path / "out"), **LOOSE), interrupt)
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ""}, "input is ''"),
        ({"output": ""}, "output is ''"),
        ({"min_user_events": 0}, "min_user_events is 0; it must be a whole number, 1 or more"),
        ({"min_item_events": -3}, "min_item_events is -3; .* 1 or more"),
        ({"min_item_events": 0}, "min_item_events is 0; .* 1 or more"),
        ({"min_item_events": 2.5}, r"min_item_events is 2\.5"),
        ({"threads": -1}, "threads is -1; .* 0 or more"),
        ({"item_column": "User_Id"}, "must be three different columns"),
        ({"memory_limit": "lots"}, "memory_limit is 'lots'; it must be like '8GB', or empty"),
    ],
)
def test_config_validates_itself(change, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**({"input": "a", "output": "b"} | change))


def test_manifest_and_dataset_agree(tmp_path):
    write_parquet(tmp_path / "log", ["b", "a", "b", "b", "b"], [1, 2, 1, 2, 1], [4, 1, 3, 2, 9])
    manifest = run(tmp_path).manifest
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["schema_version"], manifest["tie_policy"], manifest["num_files"]) == (1, "log_order", 1)
    assert (manifest["num_users"], manifest["num_items"], manifest["num_events"]) == (2, 2, 5)
    assert (manifest["out_of_order_rows"], manifest["users_too_short_to_split"]) == (2, 1)
    assert manifest["length_quantiles"] == {"min": 1, "p25": 1, "p50": 1, "p75": 4, "p90": 4, "p99": 4, "max": 4}
    assert manifest["source"]["files"] == [{"path": str(tmp_path / "log"), "bytes": (tmp_path / "log").stat().st_size}]
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.user_ids.to_pylist() == ["b", "a"]
    assert dataset.vocabulary.counts.tolist() == [3, 2]
    assert dataset.vocabulary.decode(dataset.items).to_pylist() == [2, 1, 1, 1, 2]
