"""The vocabulary's laws, the leave-one-out split against a loop over users, and damaged datasets."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

int64_ids = st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=30)


def vocabulary_of(ids):
    return Vocabulary(pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64()), np.arange(len(ids)))


@pytest.fixture
def prepared(tmp_path):
    """A dataset of users with 1, 2, 3 and 5 events, items 10, 20, 30."""
    users = [1, 2, 2, 3, 3, 3, 5, 5, 5, 5, 5]
    items = [10, 20, 10, 30, 20, 10, 10, 30, 10, 20, 10]
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": range(11)}), tmp_path / "log")
    prepare(PrepareConfig(str(tmp_path / "log"), str(tmp_path / "data"), 1, 1), progress=lambda message: None)
    return tmp_path / "data"


class TestVocabulary:
    @given(ids=int64_ids, others=int64_ids)
    def test_encode_is_the_place_or_minus_one(self, ids, others):
        asked = np.array([*others, *ids], np.int64)
        expected = [ids.index(value) if value in ids else -1 for value in asked.tolist()]
        assert vocabulary_of(ids).encode(asked).tolist() == expected

    @given(
        ids=st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=1, max_size=20),
        others=st.lists(st.text(max_size=2)),
    )
    def test_strings_too(self, ids, others):
        expected = [ids.index(value) if value in ids else -1 for value in ids + others]
        asked = pa.array(ids + others, pa.string())
        vocabulary = vocabulary_of(ids)
        for same in (asked, asked.cast(pa.large_string()), pa.chunked_array([asked, asked[:0]]), asked.dictionary_encode()):
            assert vocabulary.encode(same).tolist() == expected
        assert vocabulary.decode(vocabulary.encode(pa.array(ids))).to_pylist() == ids

    def test_neighbours_above_2_to_53_are_told_apart(self):
        vocabulary = vocabulary_of([2**53, 2**53 + 2, 2**63 - 1])
        asked = pa.array([2**53 + 1, 2**53 + 2, None, 2**63 - 1])
        assert vocabulary.encode(asked).tolist() == [-1, 1, -1, 2]
        assert vocabulary.decode(np.array([2, 0])).to_pylist() == [2**63 - 1, 2**53]

    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
    def test_every_width_of_integer(self, dtype):
        encoded = vocabulary_of([100, 0, 3]).encode(np.array([3, 100, 7], dtype))
        assert encoded.dtype == np.int64
        assert encoded.tolist() == [2, 0, -1]

    def test_uint64_does_not_wrap(self):
        asked = np.array([2**64 - 7, 5], np.uint64)  # the first has the bits of -7
        assert vocabulary_of([-7, 5]).encode(asked).tolist() == [-1, 1]

    @pytest.mark.parametrize(
        ("ids", "asked"),
        [
            ([1], pa.array(["1"])),
            ([1], np.array(["1"])),
            ([1], np.array([1.0])),
            ([1], pa.array([True])),
            (["1"], pa.array([1])),
            (["1"], np.array([1])),
        ],
    )
    def test_the_other_type_is_refused(self, ids, asked):
        with pytest.raises(InputError, match=r"the vocabulary holds (int64|string) item ids, but these are .* \(first "):
            vocabulary_of(ids).encode(asked)

    def test_nulls_and_nothing(self):
        assert vocabulary_of([1]).encode(pa.nulls(2)).tolist() == [-1, -1]
        assert vocabulary_of([]).encode(np.array([1, 2])).tolist() == [-1, -1]
        assert vocabulary_of(["a"]).encode(pa.array([], pa.string())).tolist() == []

    @pytest.mark.parametrize("index", [-1, 2])
    def test_decode_names_the_index_that_is_none(self, index):
        with pytest.raises(InputError, match=rf"index {index} at place 1 is not in \[0, 2\)"):
            vocabulary_of([5, 6]).decode(np.array([0, index]))

    def test_floats_are_no_vocabulary(self):
        with pytest.raises(InputError, match="int64 or string, not double"):
            Vocabulary(pa.array([1.0]), np.array([1]))

    @pytest.mark.parametrize("ids", [[3, 2**63 - 1, 0], ["b", "é", ""]])
    def test_save_and_load(self, tmp_path, ids):
        vocabulary = vocabulary_of(ids)
        vocabulary.save(tmp_path / "items.parquet")
        loaded = Vocabulary.load(tmp_path / "items.parquet")
        assert loaded.item_ids.equals(vocabulary.item_ids)
        assert loaded.counts.tolist() == [0, 1, 2]
        assert loaded.sha256 == vocabulary.sha256

    def test_sha256_is_pinned_and_tells_apart(self):
        # Datasets and models are matched by this value: it must never change for the same ids.
        assert vocabulary_of([1, 2]).sha256 == "d11017e8f7412023ddaf2c688822b8e662658aa6908d307820b97501fe89988a"
        assert vocabulary_of(["ab", "é"]).sha256 == "5221d8a9d2c63bb5d8c86afeee4512155802abec7e56540661bf8d8bdaed4f8e"
        lists = [[1, 2], [2, 1], ["1", "2"], ["12", ""], ["", "12"], ["12"]]
        assert len({vocabulary_of(ids).sha256 for ids in lists}) == len(lists)

    def test_sha256_ignores_how_the_array_is_cut(self):
        ids = pa.array(["x", "ab", "é"])
        assert Vocabulary(ids[1:], np.ones(2)).sha256 == vocabulary_of(["ab", "é"]).sha256

    def test_load_refuses_what_is_no_vocabulary(self, tmp_path):
        path = tmp_path / "items.parquet"
        with pytest.raises(InputError, match=r"items\.parquet' cannot be read"):
            Vocabulary.load(path)
        pq.write_table(pa.table({"item_id": [1]}), path)
        with pytest.raises(InputError, match=r"items\.parquet' cannot be read"):
            Vocabulary.load(path)
        pq.write_table(pa.table({"item_id": [1, 2], "index": [1, 0], "count": [1, 1]}), path)
        with pytest.raises(InputError, match="does not number its items"):
            Vocabulary.load(path)


class TestSplit:
    def test_by_hand(self, prepared):
        dataset = SequenceDataset.open(prepared)
        assert dataset.vocabulary.item_ids.to_pylist() == [10, 20, 30]
        assert dataset.items.tolist() == [0, 1, 0, 2, 1, 0, 0, 2, 0, 1, 0]
        assert dataset.offsets.tolist() == [0, 1, 3, 6, 11]
        assert (dataset.num_users, dataset.num_items) == (4, 3)
        items, offsets = dataset.train_sequences()
        assert (items.tolist(), offsets.tolist()) == ([0, 1, 0, 2, 0, 2, 0], [0, 1, 3, 4, 7])
        assert dataset.train_counts().tolist() == [4, 1, 2]
        valid, test = dataset.eval_cases("valid"), dataset.eval_cases("test")
        assert (valid.history_items.tolist(), valid.history_offsets.tolist()) == ([2, 0, 2, 0], [0, 1, 4])
        assert (test.history_items.tolist(), test.history_offsets.tolist()) == ([2, 1, 0, 2, 0, 1], [0, 2, 6])
        assert (valid.targets.tolist(), test.targets.tolist()) == ([1, 1], [0, 0])
        assert valid.user_index.tolist() == test.user_index.tolist() == [2, 3]

    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=12))
    def test_equals_a_loop_over_users(self, sequences):
        offsets = np.cumsum([0, *map(len, sequences)])
        vocabulary = vocabulary_of(list(range(7)))
        dataset = SequenceDataset({}, vocabulary, pa.array(range(len(sequences))), np.concatenate(sequences), offsets)
        train = [s[:-2] if len(s) >= 3 else s for s in sequences]
        assert self.ragged(*dataset.train_sequences()) == train
        assert dataset.train_counts().tolist() == [sum(s.count(item) for s in train) for item in range(7)]
        long = [user for user, s in enumerate(sequences) if len(s) >= 3]
        for split, place in (("valid", -2), ("test", -1)):
            cases = dataset.eval_cases(split)
            assert cases.user_index.tolist() == long
            assert self.ragged(cases.history_items, cases.history_offsets) == [sequences[user][:place] for user in long]
            assert cases.targets.tolist() == [sequences[user][place] for user in long]
            for array in (cases.history_items, cases.history_offsets, cases.targets, cases.user_index):
                assert array.dtype == np.int64

    @staticmethod
    def ragged(values, offsets):
        assert len(values) == offsets[-1]
        return [values[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]

    def test_unknown_split(self, prepared):
        with pytest.raises(InputError, match="split 'train' is none of 'valid', 'test'"):
            SequenceDataset.open(prepared).eval_cases("train")

    def test_histories_hold_original_ids(self, prepared, tmp_path, monkeypatch):
        monkeypatch.setattr("glintru_rec.data.dataset._HISTORIES_PER_WRITE", 1)
        SequenceDataset.open(prepared).write_histories(tmp_path / "h.parquet", "test")
        assert pq.read_table(tmp_path / "h.parquet").to_pylist() == [
            {"user_id": 3, "history": [30, 20], "target": 10},
            {"user_id": 5, "history": [10, 30, 10, 20], "target": 10},
        ]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "h.parquet", "log"]

    def test_whole_histories(self, prepared, tmp_path):
        dataset = SequenceDataset.open(prepared)
        dataset.write_histories(tmp_path / "h.parquet", "all")
        lists = self.ragged(dataset.vocabulary.decode(dataset.items).to_numpy(zero_copy_only=False), dataset.offsets)
        written = pq.read_table(tmp_path / "h.parquet").to_pylist()
        assert written == [{"user_id": user, "history": items} for user, items in zip(dataset.user_ids.to_pylist(), lists)]
        assert {"user_id": 5, "history": [10, 30, 10, 20, 10]} in written


class TestOpen:
    def edit(self, prepared, **changes):
        manifest = json.loads((prepared / "manifest.json").read_text())
        (prepared / "manifest.json").write_text(json.dumps(manifest | changes))

    def rewrite_part(self, prepared, **columns):
        part = prepared / "sequences/part-00000.parquet"
        table = pq.read_table(part)
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, values)
        pq.write_table(table, part)

    def refuses(self, prepared, message):
        with pytest.raises(InputError, match=message):
            SequenceDataset.open(prepared)

    def test_missing_manifest(self, prepared):
        (prepared / "manifest.json").unlink()
        self.refuses(prepared, r"manifest\.json' does not exist: .*data' is no prepared dataset")

    @pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "schema version None")])
    def test_corrupt_manifest(self, prepared, text, message):
        (prepared / "manifest.json").write_text(text)
        self.refuses(prepared, rf"manifest\.json' .*{message}")

    def test_other_schema_version(self, prepared):
        self.edit(prepared, schema_version=2)
        self.refuses(prepared, "has schema version 2, this program reads 1")

    def test_manifest_lacks_a_key(self, prepared):
        (prepared / "manifest.json").write_text('{"schema_version": 1, "num_users": 1, "num_items": 1, "num_events": 1}')
        self.refuses(prepared, "lacks 'vocabulary_sha256', 'parts'")

    def test_vocabulary_of_another_dataset(self, prepared):
        Vocabulary(pa.array([10, 20, 31]), np.ones(3)).save(prepared / "vocabulary/items.parquet")
        self.refuses(prepared, r"items\.parquet' has sha256 .* belongs to another dataset")

    def test_missing_part(self, prepared):
        (prepared / "sequences/part-00000.parquet").unlink()
        self.refuses(prepared, r"part-00000\.parquet' is missing")

    def test_corrupt_part(self, prepared):
        (prepared / "sequences/part-00000.parquet").write_bytes(b"PAR1")
        self.refuses(prepared, r"part-00000\.parquet' cannot be read")

    def test_part_of_another_length(self, prepared):
        part = prepared / "sequences/part-00000.parquet"
        pq.write_table(pq.read_table(part)[:2], part)
        self.refuses(prepared, r"part-00000\.parquet' holds 2 users with 3 events, the manifest says 4 with 11")

    @pytest.mark.parametrize("bad", [-1, 3])
    def test_index_outside_the_vocabulary(self, prepared, bad):
        self.rewrite_part(prepared, items=[[[0], [1, 0], [2, bad, 0], [0] * 5]])
        self.refuses(prepared, rf"item index {bad} \(user 3, row 3\), which is not in \[0, 3\)")

    def test_nulls_in_a_part(self, prepared):
        self.rewrite_part(prepared, items=[[[0], [1, None], [2, 1, 0], [0] * 5]])
        self.refuses(prepared, "holds nulls")
