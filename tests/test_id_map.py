"""The dynamic vocabulary, judged by a dict that does the same in the plainest way."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec.data import id_map as module
from glintru_rec.data.admitted import AdmittedDataset, known_batch, known_items
from glintru_rec.data.batches import Batch
from glintru_rec.data.id_map import NO_ROW, IdMap, VocabularyConfig, read_admitted
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

NUM_IDS = 12


def vocabulary_of(ids: list) -> Vocabulary:
    return Vocabulary(pa.array(ids), np.ones(len(ids), np.int64))


class NaiveMap:
    """id → [count, last seen], and the list of the ids in their rows."""

    def __init__(self, config: VocabularyConfig):
        self.capacity, self.admit_after, self.evict_ratio = config.capacity, config.admit_after, config.evict_ratio
        self.seen: dict[int, list[int]] = {}
        self.rows: list[int] = []

    def update(self, batch: list[int], step: int) -> list[int]:
        """Take a step in; give the rows that went to other ids."""
        for item in batch:
            count = self.seen.get(item, [0, 0])[0]
            self.seen[item] = [count + 1, step]
        due = [item for item in set(batch) if item not in self.rows and self.seen[item][0] >= self.admit_after]
        given_rows = []
        for item in sorted(due, key=lambda item: (-self.seen[item][0], item)):
            if len(self.rows) < self.capacity:
                self.rows.append(item)
                given_rows.append(len(self.rows) - 1)
                continue
            row = min(range(self.capacity), key=lambda row: (*self.seen[self.rows[row]], row))
            if self.seen[item][0] > self.evict_ratio * self.seen[self.rows[row]][0]:
                self.rows[row] = item
                given_rows.append(row)
        return given_rows


def feed(id_map: IdMap, batch: list[int], step: int) -> module.Changes:
    keys, counts = np.unique(np.array(batch, np.int64), return_counts=True)
    return id_map.update(keys, counts, step)


def content(id_map: IdMap) -> list[dict]:
    return sorted(id_map.to_table().to_pylist(), key=lambda entry: entry["item_id"])


batches = st.lists(st.lists(st.integers(0, NUM_IDS - 1), max_size=8), max_size=30)


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(1, 6), st.integers(1, 4), st.sampled_from([1.0, 1.5, 2.0]), st.integers(1, 5), st.booleans())
def test_the_map_equals_a_dict(steps, capacity, admit_after, evict_ratio, pool, through_a_file):
    """Whatever is seen, however few of the least useful are looked for at a time, and if every step goes through a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POOL", pool)
        vocabulary = vocabulary_of(list(range(NUM_IDS)))
        config = VocabularyConfig(capacity, admit_after, evict_ratio)
        id_map, naive = IdMap(vocabulary, config), NaiveMap(config)
        for step, batch in enumerate(steps):
            num_before = len(naive.rows)
            changes, expected = feed(id_map, batch, step), naive.update(batch, step)
            assert changes.rows.tolist() == expected
            assert changes.num_evicted == len(expected) - (len(naive.rows) - num_before)
            assert id_map.keys[: id_map.num_items].tolist() == naive.rows
            assert {key: row for key, row in enumerate(id_map.rows) if row != NO_ROW} == {
                item: row for row, item in enumerate(naive.rows)
            }
            assert {entry["item_id"]: [entry["count"], entry["last_seen"]] for entry in content(id_map)} == naive.seen
            if through_a_file:
                sink = pa.BufferOutputStream()
                pq.write_table(id_map.to_table(), sink)
                id_map = IdMap(vocabulary, config)
                id_map.load(pa.BufferReader(sink.getvalue()))


def test_the_policy_on_an_example():
    id_map = IdMap(vocabulary_of(["a", "b", "c", "d"]), VocabularyConfig(capacity=2, admit_after=2, evict_ratio=1.5))
    assert feed(id_map, [0, 0, 1], 0).rows.tolist() == [0]  # a, seen twice
    assert feed(id_map, [1], 1).rows.tolist() == [1]  # b
    assert feed(id_map, [2, 2, 2], 2).rows.size == 0  # c has been seen three times: not more than 1.5 times as often
    changes = feed(id_map, [2], 3)  # a and b have both been seen twice, a not for longer
    assert (changes.rows.tolist(), changes.num_evicted) == ([0], 1)
    assert feed(id_map, [0, 3], 4).rows.size == 0
    assert feed(id_map, [0, 3, 3], 5).rows.tolist() == [1]  # a is back, in another row
    assert content(id_map) == [
        {"item_id": "a", "row": 1, "count": 4, "last_seen": 5},
        {"item_id": "b", "row": -1, "count": 2, "last_seen": 1},
        {"item_id": "c", "row": 0, "count": 4, "last_seen": 3},
        {"item_id": "d", "row": -1, "count": 3, "last_seen": 5},
    ]


def test_the_next_run_keeps_the_rows(tmp_path):
    """Of items that the new dataset lacks, too; what waits there is forgotten. Counts weigh half, all that was is past."""
    config = VocabularyConfig(capacity=3, admit_after=2)
    first = IdMap(vocabulary_of([10, 20, 30, 40]), config)
    feed(first, [0, 0, 0, 1, 1, 2, 3], 0)
    pq.write_table(first.to_table(), tmp_path / "map")
    second = IdMap(vocabulary_of([40, 2**62, 20]), config)
    second.load(tmp_path / "map")
    second.begin_run()
    assert content(second) == [
        {"item_id": 10, "row": 0, "count": 1, "last_seen": -1},
        {"item_id": 20, "row": 1, "count": 1, "last_seen": -1},
    ]
    assert second.rows[:3].tolist() == [NO_ROW, NO_ROW, 1]
    # 40 gets the free row, 2^62 that of 10: it has been seen three times as often, and 20 more often than 10 by now.
    assert feed(second, [2, 1, 1, 1, 0, 0, 0, 0], 0).rows.tolist() == [2, 0]
    assert second.item_ids.take(pa.array(second.keys)).to_pylist() == [2**62, 20, 40]


def test_what_is_not_this_map_is_refused(tmp_path):
    vocabulary, config = vocabulary_of([1, 2, 3]), VocabularyConfig(capacity=2, admit_after=1)
    id_map = IdMap(vocabulary, config)
    feed(id_map, [0, 1], 0)
    table, path = id_map.to_table(), tmp_path / "map"

    def refused(table: pa.Table, capacity: int = 2, vocabulary: Vocabulary = vocabulary) -> str:
        pq.write_table(table, path)
        with pytest.raises(InputError) as raised:
            IdMap(vocabulary, VocabularyConfig(capacity)).load(path)
        return str(raised.value)

    assert "vocabulary.capacity is 5, but the item table" in refused(table, 5)
    assert "these are int64" in refused(table, vocabulary=vocabulary_of(["1"]))
    assert "is damaged" in refused(table.set_column(1, "row", pa.array([0, 0])))
    assert "is no id map" in refused(table.drop_columns(["count"]))
    assert "is no id map" in refused(table.replace_schema_metadata(None))
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is no id map"):
        read_admitted(path, 2)
    pq.write_table(IdMap(vocabulary, config).to_table(), path)
    with pytest.raises(InputError, match="no item with a row"):
        read_admitted(path, 2)
    with pytest.raises(InputError, match="no item was seen"):
        AdmittedDataset(None, IdMap(vocabulary, config))


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=5), st.lists(st.integers(-1, 3), min_size=6, max_size=6))
def test_unknown_items_are_left_out(sequences, rows):
    rows = np.array(rows)
    lengths = [len(sequence) for sequence in sequences]
    items, offsets = np.array(list(itertools.chain.from_iterable(sequences)), np.int64), np.cumsum([0, *lengths])
    expected = [[int(rows[item]) for item in sequence if rows[item] != NO_ROW] for sequence in sequences]
    found, bounds = known_items(items, offsets, rows)
    assert [found[start:stop].tolist() for start, stop in itertools.pairwise(bounds)] == expected
    batch = known_batch(Batch(torch.from_numpy(items), torch.from_numpy(offsets)), rows)
    parts = batch.item_ids.tensor_split(batch.offsets[1:-1]) if batch.offsets.numel() > 1 else ()
    assert [part.tolist() for part in parts] == [sequence for sequence in expected if len(sequence) >= 2]
    assert int(batch.offsets[-1]) == batch.item_ids.numel()
