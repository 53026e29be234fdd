"""The dynamic vocabulary, judged by a dict that does the same in the plainest way."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec.data import id_map as module
from glintru_rec.data.admitted import AdmittedDataset, known_batch, known_items
from glintru_rec.data.id_map import NO_ROW, IdMap, VocabularyConfig, read_admitted
from glintru_rec.data.lookup import _scrambled, hash_texts
from glintru_rec.errors import InputError

NUM_IDS = 12


def colliding_texts() -> tuple[str, str]:
    """Make two strings of 16 letters that have one hash: the second word undoes the difference that the first one made."""
    first = np.frombuffer(b"".join(b"%08d" % number for number in range(5000)), "<u8")
    middle = _scrambled(_scrambled(np.array([16], np.uint64)) ^ first)
    second = np.frombuffer(b"AAAAAAAA", "<u8") ^ middle ^ middle[0]
    words = [each.tobytes() for each in np.stack([first, second], axis=1)]
    readable = [word for word in words if word.isascii()]
    return readable[0].decode(), readable[1].decode()


COLLIDING = colliding_texts()


class NaiveMap:
    """id → [count, last seen], which of these wait, and the list of the ids in their rows."""

    def __init__(self, config: VocabularyConfig):
        self.config = config
        self.seen: dict[int, list[int]] = {}
        self.rows: list[int] = []

    def update(self, batch: list[int], step: int) -> list[int]:
        """Take a step in; give the rows that went to other ids."""
        counted = Counter(batch)
        new = sorted(counted.keys() - self.seen.keys(), key=lambda item: (-counted[item], item))
        new = new[: self.config.num_candidates]
        for item in counted.keys() & self.seen.keys():
            self.seen[item] = [self.seen[item][0] + counted[item], step]
        waiting = sorted(self.seen.keys() - set(self.rows), key=lambda item: (-self.seen[item][1], -self.seen[item][0], item))
        if len(waiting) + len(new) > self.config.num_candidates:
            for item in waiting[min(self.config.num_candidates // 2, self.config.num_candidates - len(new)) :]:
                del self.seen[item]
        self.seen |= {item: [counted[item], step] for item in new}

        due = [item for item in counted if item in self.seen and item not in self.rows]
        due = [item for item in due if self.seen[item][0] >= self.config.admit_after]
        given_rows = []
        for item in sorted(due, key=lambda item: (-self.seen[item][0], item)):
            if len(self.rows) < self.config.capacity:
                self.rows.append(item)
                given_rows.append(len(self.rows) - 1)
                continue
            row = min(range(self.config.capacity), key=lambda row: (*self.seen[self.rows[row]], row))
            if self.seen[item][0] > self.config.evict_ratio * self.seen[self.rows[row]][0]:
                self.rows[row] = item
                given_rows.append(row)
        return given_rows


def feed(id_map: IdMap, batch: list, step: int) -> module.Changes:
    """One step of one rank, as training takes it."""
    ids = pa.array(batch, id_map.id_type)
    keys, counts = np.unique(id_map.keys_of(ids), return_counts=True)
    changes = id_map.update(keys, counts, step)
    if id_map.id_type == "string":
        names = dict(zip(id_map.keys_of(ids).tolist(), batch, strict=True))
        id_map.name(changes.rows, pa.array([names[key] for key in id_map.keys[changes.rows].tolist()], pa.string()))
    return changes


def content(id_map: IdMap) -> dict:
    return {entry["key"]: [entry["count"], entry["last_seen"]] for entry in id_map.to_table().to_pylist()}


def rows_of(id_map: IdMap, ids: list) -> list[int]:
    return id_map.find(pa.array(ids, id_map.id_type)).rows.tolist()


batches = st.lists(st.lists(st.integers(0, NUM_IDS - 1), max_size=8), max_size=30)


@settings(max_examples=80, deadline=None)
@given(
    batches,
    st.integers(1, 6),
    st.integers(0, NUM_IDS),
    st.integers(1, 4),
    st.sampled_from([1.0, 1.5, 2.0]),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["int64", "string"]),
)
def test_the_map_equals_a_dict(steps, capacity, candidates, admit_after, evict_ratio, pool, through_a_file, id_type):
    """Whatever is seen, however few of the least useful are looked for at a time, and if every step goes through a file."""
    ids = list(range(NUM_IDS))
    if id_type == "string":  # in the order of their keys, which decides between equals
        texts = pa.array([f"id {number}" for number in ids])
        ids = texts.take(pa.array(np.argsort(IdMap("string", VocabularyConfig(1)).keys_of(texts)))).to_pylist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POOL", pool)
        config = VocabularyConfig(capacity, candidates, admit_after, evict_ratio)
        id_map, naive = IdMap(id_type, config), NaiveMap(config)
        keys = id_map.keys_of(pa.array(ids, id_type)).tolist()
        for step, batch in enumerate(steps):
            num_before = len(naive.rows)
            changes, expected = feed(id_map, [ids[item] for item in batch], step), naive.update(batch, step)
            assert changes.rows.tolist() == expected
            assert changes.num_evicted == len(expected) - (len(naive.rows) - num_before)
            assert content(id_map) == {keys[item]: seen for item, seen in naive.seen.items()}
            rows = {item: row for row, item in enumerate(naive.rows)}
            assert rows_of(id_map, ids) == [rows.get(item, NO_ROW) for item in range(NUM_IDS)]
            if through_a_file:
                sink = pa.BufferOutputStream()
                pq.write_table(id_map.to_table(), sink)
                id_map = IdMap(id_type, config)
                id_map.load(pa.BufferReader(sink.getvalue()))
        assert [entry["item_id"] for entry in id_map.to_table().to_pylist() if entry["row"] >= 0] == [
            ids[item] for item in naive.rows
        ]


def test_the_policy_on_an_example():
    id_map = IdMap("string", VocabularyConfig(capacity=2, candidates=4, admit_after=2, evict_ratio=1.5))
    assert feed(id_map, ["a", "a", "b"], 0).rows.tolist() == [0]  # a, seen twice
    assert feed(id_map, ["b"], 1).rows.tolist() == [1]  # b
    assert feed(id_map, ["c"] * 3, 2).rows.size == 0  # c has been seen three times: not more than 1.5 times as often
    changes = feed(id_map, ["c"], 3)  # a and b have both been seen twice, a not for longer
    assert (changes.rows.tolist(), changes.num_evicted) == ([0], 1)
    assert feed(id_map, ["a", "d"], 4).rows.size == 0
    assert feed(id_map, ["a", "d", "d"], 5).rows.tolist() == [1]  # a is back, in another row
    admitted = id_map.to_table().to_pylist()[:2]
    assert [list(entry.values())[1:] for entry in admitted] == [["c", 0, 4, 3], ["a", 1, 4, 5]]
    waiting = {entry["key"]: entry for entry in id_map.to_table().to_pylist()[2:]}
    for name, count, last_seen in (("b", 2, 1), ("d", 3, 5)):
        (key,) = id_map.keys_of(pa.array([name])).tolist()
        assert waiting[key] == {"key": key, "item_id": None, "row": -1, "count": count, "last_seen": last_seen}


def test_counts_against_exact_ones():
    """None is too high; one is too low only by what was seen before half the room for candidates went to others since.

    Ids come at random, some often, most of them once; forty times as many as there is room for.
    """
    rng, size = np.random.default_rng(0), 60
    id_map = IdMap("int64", VocabularyConfig(1, size, admit_after=10**9))  # nobody is admitted: all are candidates
    seen: dict[int, list[int]] = defaultdict(list)
    latest: list[int] = []  # ids in the order in which they were seen last
    guaranteed: Counter = Counter()
    num_bytes, num_low = id_map.nbytes, 0
    for step in range(400):
        batch = np.concatenate([rng.integers(0, 2, 4), rng.integers(2, 20_000, 8)])
        for item in set(batch.tolist()):
            others = latest[latest.index(item) + 1 :] if item in latest else latest
            if len(others) + batch.size >= size // 2:  # it may have been forgotten
                guaranteed[item] = 0
            latest = [other for other in latest if other != item]
        for item in batch.tolist():
            seen[item].append(step)
            guaranteed[item] += 1
        latest = [*latest, *set(batch.tolist())]
        feed(id_map, batch.tolist(), step)
        for key, (count, last_seen) in content(id_map).items():
            assert guaranteed[key] <= count <= len(seen[key])
            assert last_seen == seen[key][-1]
            num_low += count < len(seen[key])
    assert len(seen) > 40 * size
    assert num_low
    assert id_map.nbytes == num_bytes
    assert len(content(id_map)) <= size
    assert all(content(id_map)[item][0] == len(seen[item]) for item in range(2))  # what comes often is not forgotten


def test_a_flood_of_new_ids_does_not_keep_others_out():
    """Unless the room for candidates is said to be less than what a step brings: here four times as many ids as rows."""
    rng = np.random.default_rng(0)
    steps = [np.unique(rng.integers(0, 1500, 400)) for _ in range(40)]
    admitted = {}
    for candidates in (0, 1000):
        id_map = IdMap("int64", VocabularyConfig(capacity=1000, candidates=candidates))
        for step, often in enumerate(steps):
            keys = np.concatenate([often, 10**6 + 4000 * step + np.arange(4000)])
            id_map.update(keys, np.ones(keys.size, np.int64), step)
        admitted[candidates] = id_map.to_table()["item_id"].drop_null().to_pylist()
    assert len(admitted[0]) == 1000
    assert max(admitted[0]) < 1500
    assert not admitted[1000]


def test_two_strings_with_one_hash_are_never_taken_for_each_other():
    one, other = COLLIDING
    assert one != other
    id_map = IdMap("string", VocabularyConfig(capacity=3, admit_after=2))
    assert len(set(id_map.keys_of(pa.array([one, other])).tolist())) == 1
    feed(id_map, [one, one, "x", "x"], 0)
    found = id_map.find(pa.array([other, "x", one, "y", other]))
    assert (found.rows.tolist(), found.collides.tolist()) in (
        ([-1, row, 1 - row, -1, -1], [True, False, False, False, True]) for row in (0, 1)
    )
    assert not IdMap("int64", VocabularyConfig(3)).find(pa.array([1, 2])).collides.any()


def test_hashes_are_as_good_as_chance():
    """Numbered ids of several lengths: among 400,000 hashes, as many agree in 32 bits as those of chance would."""
    numbers = np.arange(100_000)
    texts = [pa.array([form % number for number in numbers]) for form in ("%d", "item %d", "%012d-size-44")]
    texts.append(pa.array([f"shop/{number % 500}/a-long-name/{number // 500}" for number in numbers]))
    for shift in (0, 16, 32):
        parts = np.concatenate([hash_texts(each, 40) for each in texts]) >> np.uint64(shift) & np.uint64(2**32 - 1)
        num_pairs = parts.size * (parts.size - 1) / 2 / 2**32
        assert abs(parts.size - np.unique(parts).size - num_pairs) < 5 * num_pairs**0.5


def test_the_next_run_keeps_the_rows(tmp_path):
    """Counts weigh half, all that was is past; a candidate of which nothing is left is forgotten."""
    config = VocabularyConfig(capacity=3, admit_after=2, candidates=5)
    first = IdMap("int64", config)
    feed(first, [10, 10, 10, 20, 20, 30], 0)
    feed(first, [40], 1)
    pq.write_table(first.to_table(), tmp_path / "map")
    second = IdMap("int64", config)
    second.load(tmp_path / "map")
    second.begin_run()
    assert content(second) == {10: [1, -2], 20: [1, -2]}
    assert rows_of(second, [40, 2**62, 20, 10]) == [NO_ROW, NO_ROW, 1, 0]
    # 40 gets the free row, 2^62 that of 10: it has been seen three times as often, and 20 more often than 10 by now.
    assert feed(second, [20, 2**62, 2**62, 2**62, 40, 40, 40, 40], 0).rows.tolist() == [2, 0]
    assert rows_of(second, [2**62, 20, 40, 10]) == [0, 1, 2, NO_ROW]
    # Of more candidates than there is room for, those seen last stay.
    pq.write_table(second.to_table(), tmp_path / "map")
    feed(second, [1, 2], 1)
    pq.write_table(second.to_table(), tmp_path / "map")
    third = IdMap("int64", VocabularyConfig(capacity=3, candidates=2))
    third.load(tmp_path / "map")
    assert content(third).keys() == {2**62, 20, 40, 1, 2}


def test_what_is_not_this_map_is_refused(tmp_path):
    config = VocabularyConfig(capacity=2, admit_after=1)
    id_map, path = IdMap("string", config), tmp_path / "map"
    feed(id_map, ["a", "b"], 0)
    table = id_map.to_table()

    def refused(table: pa.Table, capacity: int = 2, id_type: str = "string") -> str:
        pq.write_table(table, path)
        with pytest.raises(InputError) as raised:
            IdMap(id_type, VocabularyConfig(capacity)).load(path)
        return str(raised.value)

    assert "vocabulary.capacity is 5, but the item table" in refused(table, 5)
    assert "has string ids, the dataset's are int64" in refused(table, id_type="int64")
    assert "its rows are not 0, 1" in refused(table.set_column(2, "row", pa.array([0, 0])))
    assert "or a key comes twice" in refused(table.set_column(0, "key", pa.array([7, 7])))
    assert "its keys are not those of its ids" in refused(
        table.set_column(1, "item_id", table["item_id"].take(pa.array([1, 0])))
    )
    assert "is no id map" in refused(table.drop_columns(["count"]))
    assert "is no id map" in refused(table.replace_schema_metadata(None))
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is no id map"):
        read_admitted(path, 2)
    pq.write_table(IdMap("string", config).to_table(), path)
    with pytest.raises(InputError, match="no item with a row"):
        read_admitted(path, 2)
    with pytest.raises(InputError, match="no item was seen"):
        AdmittedDataset(None, IdMap("string", config))
    with pytest.raises(InputError, match="the item ids are int64, those of the run's id map are string"):
        id_map.find(pa.array([1]))


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=5), st.lists(st.integers(-1, 3), min_size=6, max_size=6))
def test_unknown_items_are_left_out(sequences, rows):
    rows = np.array(rows)
    lengths = [len(sequence) for sequence in sequences]
    items, offsets = np.array(list(itertools.chain.from_iterable(sequences)), np.int64), np.cumsum([0, *lengths])
    expected = [[int(rows[item]) for item in sequence if rows[item] != NO_ROW] for sequence in sequences]
    found, bounds = known_items(rows[items], offsets)
    assert [found[start:stop].tolist() for start, stop in itertools.pairwise(bounds)] == expected
    batch = known_batch(rows[items], offsets)
    parts = batch.item_ids.tensor_split(batch.offsets[1:-1]) if batch.offsets.numel() > 1 else ()
    assert [part.tolist() for part in parts] == [sequence for sequence in expected if len(sequence) >= 2]
    assert int(batch.offsets[-1]) == batch.item_ids.numel()
