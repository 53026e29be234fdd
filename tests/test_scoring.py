"""The scoring job: every row comes out once, scored as the model scores it or set aside with its reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import GlintRU
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.jagged import keep_last, offsets_from_lengths
from glintru_rec.model import SequenceModel
from glintru_rec.scoring import ScoreConfig, score

NUM_ITEMS, WIDTH, MAX_SEQ_LEN = 60, 16, 20
FIRST_ID = 2**60  # a float64 would round all of these ids to one
STRING_IDS = pa.array([f"item ü/{i}" for i in range(NUM_ITEMS)])
INT_IDS = pa.array(np.arange(NUM_ITEMS)[::-1] + FIRST_ID)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads do not help tensors this small, and wait for each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class PlainTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NUM_ITEMS, WIDTH)

    def forward(self, item_ids, more_ids):
        return self.embedding(item_ids), self.embedding(more_ids)


def make_model():
    torch.manual_seed(0)
    return SequenceModel(PlainTable(), GlintRU(WIDTH), "dot").eval()


def export(folder, item_ids):
    model = make_model()
    export_artifact(
        model.encoder,
        model.similarity,
        model.table.embedding.weight,
        Vocabulary(item_ids, np.ones(NUM_ITEMS, dtype=np.int64)),
        folder,
        max_seq_len=MAX_SEQ_LEN,
        encoder_config={},
        provenance={"run": "a-run", "step": 3},
    )
    return str(folder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export(tmp_path_factory.mktemp("int") / "artifact", INT_IDS)


@pytest.fixture(scope="module")
def string_artifact(tmp_path_factory):
    return export(tmp_path_factory.mktemp("string") / "artifact", STRING_IDS)


@torch.no_grad()
def true_queries(histories):
    """Encode lists of indices with the eager model, one by one."""
    model = make_model()
    queries = []
    for history in histories:
        item_ids = torch.tensor(history)
        recent, offsets = keep_last(item_ids, offsets_from_lengths(torch.tensor([len(history)])), MAX_SEQ_LEN)
        queries.append(model.encode(recent, offsets, item_ids[:0])[0][0])
    return torch.stack(queries)


@torch.no_grad()
def true_scores(histories):
    return (true_queries(histories) @ make_model().table.embedding.weight.t()).numpy()


def random_lists(num_rows, longest, seed=0, shortest=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(NUM_ITEMS, size=size).tolist() for size in generator.integers(shortest, longest + 1, num_rows)]


def as_ids(lists, item_ids):
    """Lists of indices as a column of original ids."""
    names = item_ids.to_pylist()
    return pa.array([[names[i] for i in items] for items in lists], pa.list_(item_ids.type))


def write(path, row_group_size=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def read(path):
    return pq.read_table(path, partitioning=None)


@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_candidates_are_scored_in_their_order(artifact, tmp_path, batch_size):
    histories, candidates = random_lists(40, 45, shortest=1), random_lists(40, 12, seed=1)
    users = pa.array(np.arange(40) + 2**61, pa.int64())
    source = write(
        tmp_path / "in.parquet",
        row_group_size=9,
        user_id=users,
        history=as_ids(histories, INT_IDS),
        candidates=as_ids(candidates, INT_IDS),
        unrelated=pa.array(np.arange(40.0)),
    )
    report = score(ScoreConfig(artifact, source, str(tmp_path / "out"), "candidates", batch_size=batch_size))
    out = read(tmp_path / "out" / "in.parquet")
    assert out.column_names == ["user_id", "item_ids", "scores"]
    assert out["user_id"].combine_chunks() == users
    assert out.schema.field("item_ids").type.value_type == pa.int64()
    assert out.schema.field("scores").type.value_type == pa.float32()
    assert out["item_ids"].to_pylist() == as_ids(candidates, INT_IDS).to_pylist()
    truth = true_scores(histories)
    for row, items in enumerate(candidates):
        np.testing.assert_allclose(out["scores"][row].as_py(), truth[row, items], rtol=0, atol=1e-5)
    assert (report.rows_in, report.rows_scored, report.rows_set_aside) == (40, 40, {})


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_top_k_is_argsort_of_the_catalog(artifact, tmp_path, exclude_seen):
    histories = random_lists(30, 80, shortest=1)
    source = write(tmp_path / "in.parquet", user_id=pa.array(np.arange(30)), history=as_ids(histories, INT_IDS))
    config = ScoreConfig(artifact, source, str(tmp_path / "out"), "top_k", top_k=25, exclude_seen=exclude_seen, batch_size=8)
    score(config)
    out = read(tmp_path / "out" / "in.parquet")
    truth = true_scores(histories)
    for row, history in enumerate(histories):
        if exclude_seen:  # the whole history, not only what the encoder sees of it
            truth[row, history] = -np.inf
        order = np.argsort(-truth[row], kind="stable")[:25]
        order = order[np.isfinite(truth[row, order])]  # a long history leaves fewer items than were asked for
        assert out["item_ids"][row].as_py() == INT_IDS.take(pa.array(order)).to_pylist()
        np.testing.assert_allclose(out["scores"][row].as_py(), truth[row, order], rtol=0, atol=1e-5)
    assert not exclude_seen or min(len(row) for row in out["scores"]) < 25


def test_encode_writes_the_query(artifact, tmp_path):
    histories = random_lists(20, 45, shortest=1)
    source = write(tmp_path / "in.parquet", user_id=pa.array(np.arange(20)), history=as_ids(histories, INT_IDS))
    score(ScoreConfig(artifact, source, str(tmp_path / "out"), "encode", batch_size=6))
    out = read(tmp_path / "out" / "in.parquet")
    assert out.column_names == ["user_id", "embedding"]
    np.testing.assert_allclose(np.array(out["embedding"].to_pylist()), true_queries(histories), rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_string_ids_of_every_kind(string_artifact, tmp_path, text):
    """In several row groups, each of which has its own dictionaries."""
    histories, candidates = random_lists(10, 20, shortest=1), random_lists(10, 5, seed=1)
    lists = [as_ids(items, STRING_IDS).to_pylist() for items in (histories, candidates)]
    as_text = [
        pa.LargeListArray.from_arrays(column.offsets.cast(pa.int64()), column.values.cast(text))
        for column in map(pa.array, lists)
    ]
    users = pa.array([f"u{i}" for i in range(10)]).cast(text)
    source = write(tmp_path / "in.parquet", 3, user_id=users, history=as_text[0], candidates=as_text[1])
    score(ScoreConfig(string_artifact, source, str(tmp_path / "out"), "candidates"))
    out = read(tmp_path / "out" / "in.parquet")
    assert out["user_id"].to_pylist() == [f"u{i}" for i in range(10)]
    assert out["item_ids"].to_pylist() == lists[1]
    assert out.schema.field("item_ids").type.value_type == pa.string()
    truth = true_scores(histories)
    for row, items in enumerate(candidates):
        np.testing.assert_allclose(out["scores"][row].as_py(), truth[row, items], rtol=0, atol=1e-5)


def test_what_cannot_be_scored_is_set_aside_with_its_reason(artifact, tmp_path):
    a, b, c = INT_IDS[:3].to_pylist()
    rows = [
        (10, [a, b], [c], None),
        (None, [a], [c], "null_user"),
        (12, None, [c], "null_history"),
        (13, [a, None], [c], "null_history_item"),
        (14, [a], None, "null_candidates"),
        (15, [a], [c, None], "null_candidate"),
        (16, [], [c], "empty_history"),
        (17, [-1, 5, FIRST_ID - 1], [c], "empty_history"),
        (18, [7, a, -5, b], [c, 99, a, -1], None),
        (19, [c], [], None),
        (20, [c], [3], None),
        (None, None, None, "null_user"),
    ]
    users, histories, candidates, reasons = map(list, zip(*rows))
    source = write(
        tmp_path / "in.parquet",
        user_id=pa.array(users, pa.int32()),
        history=pa.array(histories, pa.list_(pa.int64())),
        candidates=pa.array(candidates, pa.list_(pa.int64())),
    )
    report = score(ScoreConfig(artifact, source, str(tmp_path / "out"), "candidates", batch_size=5))

    out = read(tmp_path / "out" / "in.parquet")
    assert out.schema.field("user_id").type == pa.int32()
    assert out["user_id"].to_pylist() == [10, 18, 19, 20]
    assert out["item_ids"].to_pylist() == [[c], [c, a], [], []]
    truth = true_scores([[0, 1]])[0]
    np.testing.assert_allclose(out["scores"][0].as_py(), truth[[2]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out["scores"][1].as_py(), truth[[2, 0]], rtol=0, atol=1e-5)  # unknown items were skipped

    rejects = read(tmp_path / "out" / "rejects" / "in.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejects] == [(i, why) for i, why in enumerate(reasons, 1) if why]
    assert [row["user_id"] for row in rejects] == [None, "12", "13", "14", "15", "16", "17", None]
    assert {row["fragment"] for row in rejects} == {"in.parquet"}

    unknown = read(tmp_path / "out" / "unknown_candidates" / "in.parquet").to_pylist()
    assert [(row["user_id"], row["item_id"], row["row"]) for row in unknown] == [
        ("18", "99", 9),
        ("18", "-1", 9),
        ("20", "3", 11),
    ]

    assert (report.rows_in, report.rows_scored) == (12, 4)
    assert report.rows_set_aside == {
        "empty_history": 2,
        "null_candidate": 1,
        "null_candidates": 1,
        "null_history": 1,
        "null_history_item": 1,
        "null_user": 2,
    }
    assert report.unknown_history_items == 3 + 2
    assert report.unknown_candidates == 3
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["rows_in"] == 12
    assert written["rows_set_aside"] == report.rows_set_aside
    assert written["model"] == {"run": "a-run", "step": 3}
    assert written["config"]["mode"] == "candidates"
    assert (tmp_path / "out" / "_SUCCESS").exists()


ITEM = st.one_of(st.none(), st.sampled_from([-1, 0, 2**63 - 1]), st.sampled_from(INT_IDS.to_pylist()))
LIST = st.one_of(st.none(), st.lists(ITEM, max_size=5))
ROW = st.tuples(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), LIST, LIST)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fragments=st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=3),
    mode=st.sampled_from(["candidates", "top_k", "encode"]),
    batch_size=st.integers(1, 6),
)
def test_rows_in_are_rows_scored_and_rows_set_aside(artifact, fragments, mode, batch_size):
    rows = [row for fragment in fragments for row in fragment]
    types = [pa.int64(), pa.list_(pa.int64()), pa.list_(pa.int64())]
    with TemporaryDirectory() as folder:
        for number, fragment in enumerate(fragments):
            columns = [pa.array([row[i] for row in fragment], types[i]) for i in range(3)]
            names = ("user_id", "history", "candidates")
            write(Path(folder) / "in" / f"part-{number:05d}.parquet", **dict(zip(names, columns)))
        output = Path(folder) / "out"
        config = ScoreConfig(artifact, f"{folder}/in", str(output), mode, top_k=3, batch_size=batch_size)
        if not rows:
            with pytest.raises(InputError, match="holds no rows"):
                score(config)
            return
        report = score(config)
        scored = [read(path) for path in sorted(output.glob("*.parquet"))]
        rejected = [read(path) for path in sorted(output.glob("rejects/*.parquet"))]

    known = set(INT_IDS.to_pylist())
    expected = []
    for user, history, candidates in rows:
        lists = [history, candidates] if mode == "candidates" else [history]
        whole = user is not None and all(items is not None and None not in items for items in lists)
        if whole and known & set(history):
            expected.append((user, [item for item in candidates if item in known] if mode == "candidates" else None))
    assert len(scored) == len(fragments)
    assert [user for table in scored for user in table["user_id"].to_pylist()] == [user for user, _ in expected]
    if mode == "candidates":
        item_ids = [items for table in scored for items in table["item_ids"].to_pylist()]
        assert item_ids == [items for _, items in expected]
        assert [len(row) for table in scored for row in table["scores"].to_pylist()] == [len(items) for items in item_ids]
    assert report.rows_scored == len(expected)
    assert report.rows_in == len(rows) == report.rows_scored + sum(report.rows_set_aside.values())
    assert sum(len(table) for table in rejected) == len(rows) - len(expected)


def test_a_folder_gives_one_file_for_each_of_its_own(artifact, tmp_path):
    for name in ("part-00000", "part-00001", "day=2/part-00000", "_temporary/part-00000"):
        path = tmp_path / "in" / f"{name}.parquet"
        write(path, user_id=pa.array([name]), history=as_ids([[1]], INT_IDS))
    write(tmp_path / "in" / "part-00002.parquet", user_id=pa.array([], pa.string()), history=as_ids([], INT_IDS))
    (tmp_path / "in" / "_SUCCESS").write_text("")
    seen = []
    score(ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "out"), "encode"), lambda *done: seen.append(done))
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    parts = ["day=2__part-00000.parquet", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert sorted(written) == [".job", "_SUCCESS", *parts, "report.json"]
    users = [read(written[name])["user_id"].to_pylist() for name in parts]
    assert users == [["day=2/part-00000"], ["part-00000"], ["part-00001"], []]
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_a_glob_picks_its_files(artifact, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.parquet", user_id=pa.array([name]), history=as_ids([[1]], INT_IDS))
    score(ScoreConfig(artifact, str(tmp_path / "in" / "b*.parquet"), str(tmp_path / "out"), "encode"))
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["b.parquet"]


def test_two_files_of_one_output_name_are_refused(artifact, tmp_path):
    for name in ("a/b", "a__b"):
        write(tmp_path / "in" / f"{name}.parquet", user_id=pa.array(["u"]), history=as_ids([[1]], INT_IDS))
    refused(ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "out"), "encode"), r"both be written as 'a__b\.parquet'")


def test_histories_that_are_all_empty_have_no_item_type(artifact, tmp_path):
    source = write(tmp_path / "in.parquet", user_id=pa.array([1, 2]), history=pa.array([[], [None]]))
    report = score(ScoreConfig(artifact, source, str(tmp_path / "out"), "top_k"))
    assert report.rows_set_aside == {"empty_history": 1, "null_history_item": 1}
    assert len(read(tmp_path / "out" / "in.parquet")) == 0


def test_results_do_not_depend_on_the_batch_size(artifact, tmp_path):
    source = write(
        tmp_path / "in.parquet",
        user_id=pa.array(np.arange(50)),
        history=as_ids(random_lists(50, 45), INT_IDS),
        candidates=as_ids(random_lists(50, 9, seed=1), INT_IDS),
    )
    tables = []
    for batch_size in (1, 13, 1024):
        output = tmp_path / f"out-{batch_size}"
        score(ScoreConfig(artifact, source, str(output), "candidates", batch_size=batch_size))
        tables.append(read(output / "in.parquet"))
    for table in tables[1:]:
        assert table.select(["user_id", "item_ids"]) == tables[0].select(["user_id", "item_ids"])
        scores = [column.combine_chunks().flatten() for column in (table["scores"], tables[0]["scores"])]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)


def test_large_outputs_are_written_in_several_row_groups(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.writer._ROW_GROUP_BYTES", 1000)
    histories = random_lists(64, 5, shortest=1)
    source = write(tmp_path / "in.parquet", user_id=pa.array(np.arange(64)), history=as_ids(histories, INT_IDS))
    score(ScoreConfig(artifact, source, str(tmp_path / "out"), "encode", batch_size=8))
    metadata = pq.read_metadata(tmp_path / "out" / "in.parquet")
    assert metadata.num_rows == 64
    assert 1 < metadata.num_row_groups < 8


@pytest.mark.programs
def test_job_needs_neither_torchrec_nor_fbgemm(artifact, tmp_path):
    source = write(tmp_path / "in.parquet", user_id=pa.array(["u"]), history=as_ids([[1]], INT_IDS))
    program = f"""
import sys
sys.modules["torchrec"] = sys.modules["fbgemm_gpu"] = None
from glintru_rec.scoring import ScoreConfig, score
score(ScoreConfig({artifact!r}, {source!r}, {str(tmp_path / "out")!r}, "top_k"))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def refused(config, message):
    with pytest.raises(InputError, match=message):
        score(config)
    assert not Path(config.output).exists()


class TestBadInput:
    @pytest.fixture
    def config(self, artifact, tmp_path):
        source = str(tmp_path / "in")
        return lambda mode="candidates", **changes: ScoreConfig(
            **{"artifact": artifact, "input": source, "output": str(tmp_path / "out"), "mode": mode} | changes
        )

    def test_no_file(self, config, tmp_path):
        refused(config(), "matches no file")
        refused(config(input=str(tmp_path / "*.parquet")), "matches no file")

    def test_no_rows(self, config, tmp_path):
        write(tmp_path / "in" / "a.parquet", user_id=pa.array([], pa.int64()), history=pa.array([], pa.list_(pa.int64())))
        refused(config("top_k"), "holds no rows")

    @pytest.mark.parametrize("content", [b"", b"user_id,history\n", b"PAR1 and no more"])
    def test_not_parquet(self, config, tmp_path, content):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.parquet").write_bytes(content)
        refused(config(), r"a\.parquet' is not readable parquet")

    @pytest.mark.parametrize("column", ["user_id", "history", "candidates"])
    def test_column_missing(self, config, tmp_path, column):
        columns = {"user_id": pa.array([1]), "history": pa.array([[1]]), "candidates": pa.array([[1]])}
        write(
            tmp_path / "in" / "a.parquet",
            **{name: values for name, values in columns.items() if name != column},
            other=pa.array([1]),
        )
        present = ", ".join(f"'{name}'" for name in columns if name != column)
        refused(config(), f"a.parquet' has no column '{column}'; it has {present}, 'other'")

    def test_columns_can_have_other_names(self, config, tmp_path):
        write(tmp_path / "in" / "a.parquet", who=pa.array([1]), what=as_ids([[1]], INT_IDS), which=as_ids([[2]], INT_IDS))
        report = score(config(user_column="who", history_column="what", candidates_column="which"))
        assert report.rows_scored == 1
        assert read(tmp_path / "out" / "a.parquet").column_names == ["user_id", "item_ids", "scores"]

    @pytest.mark.parametrize("values", [[["a"]], [[1.0]], [1], ["a"], [[[1]]]], ids=str)
    @pytest.mark.parametrize("column", ["history", "candidates"])
    def test_items_of_another_type(self, config, tmp_path, column, values):
        columns = {"user_id": pa.array([1]), "history": pa.array([[1]]), "candidates": pa.array([[1]])} | {
            column: pa.array(values)
        }
        write(tmp_path / "in" / "a.parquet", **columns)
        refused(config(), f"column '{column}' of .*a.parquet' has type .*; the vocabulary holds int64 item ids")

    def test_numbers_for_a_string_vocabulary(self, config, string_artifact, tmp_path):
        write(tmp_path / "in" / "a.parquet", user_id=pa.array([1]), history=pa.array([[1]]))
        refused(
            config("top_k", artifact=string_artifact), "column 'history' .* has type list<.*int64>; the vocabulary holds string"
        )

    def test_users_of_another_type(self, config, tmp_path):
        write(tmp_path / "in" / "a.parquet", user_id=pa.array([1.5]), history=pa.array([[1]]))
        refused(config("top_k"), "column 'user_id' of .* has type double; it must hold integers or strings")

    def test_output_that_is_taken(self, config, tmp_path):
        write(tmp_path / "in" / "a.parquet", user_id=pa.array([1]), history=as_ids([[1]], INT_IDS))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="out' exists and is not an empty folder"):
            score(config("encode"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
        with pytest.raises(InputError, match="cannot be written"):
            score(config("encode", output=str(tmp_path / "in" / "a.parquet" / "below")))

    def test_artifact_that_is_none(self, config, tmp_path):
        refused(config(artifact=str(tmp_path)), "has no manifest.json")

    def test_artifact_that_was_changed(self, config, artifact, tmp_path):
        changed = shutil.copytree(artifact, tmp_path / "changed")
        (changed / "model.pt").write_bytes(b"x")
        refused(config(artifact=str(changed)), "model.pt of artifact .* is not the file that was exported")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "best"}, "mode is 'best'; it must be one of candidates, top_k, encode"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"empty_history": "zero"}, "empty_history is 'zero'; it must be one of reject, popular"),
        ({"mode": "encode", "empty_history": "popular"}, "empty_history is 'popular'; it must be reject, as mode is 'encode'"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"input": ""}, "input is ''"),
        ({"history_column": "user_id"}, "must be three different names"),
        ({"device": "gpu"}, "device is 'gpu'; it must be cpu, cuda or cuda:N"),
        ({"device": "cuda:999"}, "device is 'cuda:999'; this machine has"),
    ],
)
def test_config_names_key_value_and_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        ScoreConfig(**{"artifact": "a", "input": "i", "output": "o", "mode": "top_k"} | changes)
