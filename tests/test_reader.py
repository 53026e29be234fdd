"""The reader that holds a few row groups at a time: every event once, on any ranks, across any resume, in flat memory."""

import json
import re
import shutil
import threading
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec.config import compose
from glintru_rec.data.batches import START, TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.reader import Ranks, RowGroupBatches
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.metrics import Protocol
from glintru_rec.scoring.evaluation import evaluate
from glintru_rec.training.build import build_distributed
from glintru_rec.training.checkpoint import RunState, list_checkpoints, read_state
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer
from tests.conftest import SMALL, run_program

laws = settings(max_examples=40, deadline=None)
# Users with too few events to split, or to train on, among others; at least one has a training target.
histories = st.lists(st.integers(1, 30), min_size=3, max_size=16).filter(lambda lengths: max(lengths) > 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Fresh folders, as many as a law asks for."""
    return lambda: tmp_path_factory.mktemp("sequences")


def write_dataset(folder, lengths, users_per_group=2, users_per_part=5):
    """A dataset in which every event is an item of its own, numbered as the events are, and user u has id 100 + u."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = pa.array(np.arange(offsets[-1]))
    vocabulary = Vocabulary(items, np.ones(len(items), np.int64))
    (folder / "vocabulary").mkdir()
    vocabulary.save(folder / "vocabulary/items.parquet")
    (folder / "sequences").mkdir()
    parts = []
    for first in range(0, len(lengths), users_per_part):
        own = offsets[first : first + users_per_part + 1]
        lists = pa.ListArray.from_arrays(pa.array(own - own[0], pa.int32()), items[own[0] : own[-1]])
        table = pa.table({"user_id": 100 + first + np.arange(len(own) - 1), "items": lists, "timestamps": lists})
        file = f"sequences/part-{len(parts):05d}.parquet"
        pq.write_table(table, folder / file, row_group_size=users_per_group)
        parts.append({"file": file, "num_users": len(table), "num_events": int(own[-1] - own[0])})
    short = sum(length < 3 for length in lengths)
    counts = {"num_users": len(lengths), "num_items": len(items), "num_events": len(items), "users_too_short_to_split": short}
    manifest = {"schema_version": 1, "vocabulary_sha256": vocabulary.sha256, **counts, "parts": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Together:
    """Ranks that are threads."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.told = [None] * world_size

    def run(self, work):
        """Call ``work(ranks)`` as every rank; give what each returned."""
        each = [Ranks(r, self.world_size, partial(self.gather, r), partial(self.total, r)) for r in range(self.world_size)]
        with ThreadPoolExecutor(self.world_size) as pool:
            return [future.result() for future in [pool.submit(work, ranks) for ranks in each]]

    def gather(self, rank, numbers):
        self.told[rank] = numbers
        self.barrier.wait()
        told = list(self.told)
        self.barrier.wait()  # nobody tells the next before all have read this
        return told

    def total(self, rank, counts):
        return np.sum(self.gather(rank, counts), axis=0)


def open_batches(folder, ranks=None, held=1, max_seq_len=5, batch_targets=11, seed=0, **options):
    dataset = RowGroupDataset.open(folder, held)
    return RowGroupBatches(dataset, max_seq_len, batch_targets, seed, ranks or Ranks(), **options)


def members(batch):
    return [tuple(part.tolist()) for part in batch.item_ids.tensor_split(batch.offsets[1:-1])] if len(batch.offsets) > 1 else []


def steps_of(folder, world_size, epoch=0, place=START, num_steps=None, **options):
    """Steps of an epoch, each the members of the ranks' batches, and the place after them; all ranks must agree on it."""

    def work(ranks):
        batches = open_batches(folder, ranks, **options)
        given, places = [], [place]
        for batch in batches.epoch(epoch, place):
            given.append(members(batch))
            places.append(batches.place)
            if len(given) == num_steps:
                break
        return given, places

    found = Together(world_size).run(work)
    assert all(places == found[0][1] for _, places in found)
    return list(zip(*(given for given, _ in found), strict=True)), found[0][1][-1]


def through_json(place):
    """What a resumed run reads of a place."""
    state = RunState("model", "vocabulary", "batching")
    state.place = place
    return RunState(**json.loads(json.dumps(asdict(state)))).place


def windows(steps):
    return Counter(member for step in steps for batch in step for member in batch)


def targets_in_memory(folder):
    items, offsets = SequenceDataset.open(folder).train_sequences()
    return Counter(int(item) for start, stop in pairwise(offsets) for item in items[start + 1 : stop])


@laws
@given(
    histories,
    st.integers(1, 9),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from([0.0, 1.0]),
)
def test_every_target_of_memory_mode_once(folders, lengths, max_seq_len, slack, world_size, held, epoch, reversed_share):
    folder = write_dataset(folders(), lengths, users_per_group=1)
    options = {"max_seq_len": max_seq_len, "batch_targets": max_seq_len + slack, "held": held}
    if -(-len(lengths) // held) < world_size:
        return
    options |= {"reversed_share": reversed_share, "reversed_epochs": 1}
    steps, place = steps_of(folder, world_size, epoch, **options)
    found = windows(steps)
    turned = -1 if reversed_share and epoch < 1 else 1
    assert all(np.array_equal(np.diff(member), [turned] * (len(member) - 1)) for member in found)
    # Turned, it is the last item of each window that is no target; forwards it is the first.
    in_order = Counter({member[::turned]: count for member, count in found.items()})
    assert Counter(item for member in in_order.elements() for item in member[1:]) == targets_in_memory(folder)
    assert all(1 <= len(member) - 1 <= max_seq_len for member in found)
    sizes = [sum(len(member) - 1 for member in batch) for step in steps for batch in step]
    assert max(sizes) <= max_seq_len + slack
    assert place.batches == sum(size > 0 for size in sizes)
    assert windows(steps_of(folder, 1, epoch, **options)[0]) == found  # which rank reads a chunk changes nothing in it


@laws
@given(histories, st.integers(1, 3))
def test_one_target_a_sequence(folders, lengths, world_size):
    folder = write_dataset(folders(), lengths, users_per_group=1)
    options = {"every_position": False, "max_seq_len": 4, "batch_targets": 3}
    found = windows(steps_of(folder, world_size, **options)[0])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    users = Counter(int(np.searchsorted(bounds, member[-1], side="right")) - 1 for member in found.elements())
    train = [length - 2 if length >= 3 else length for length in lengths]
    assert users == Counter(user for user, length in enumerate(train) if length > 1)


@laws
@given(
    histories,
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(0, 20)), max_size=4),
    st.tuples(st.integers(1, 3), st.integers(0, 20)),
    st.integers(1, 2),
)
def test_a_resume_on_any_ranks_with_any_batches_skips_and_repeats_nothing(folders, lengths, parts, last, held):
    """Some steps on some ranks with batches of some size, again and again, and the rest: each window of the epoch once."""
    folder = write_dataset(folders(), lengths, users_per_group=1)
    if -(-len(lengths) // held) < 3:
        return
    options = {"epoch": 1, "held": held}
    place, found = START, Counter()
    for world_size, num_steps, slack in parts:
        if num_steps:
            again = {"place": through_json(place), "num_steps": num_steps, "batch_targets": 5 + slack}
            steps, place = steps_of(folder, world_size, **again, **options)
            found += windows(steps)
    rest, place = steps_of(folder, last[0], place=through_json(place), batch_targets=5 + last[1], **options)
    assert found + windows(rest) == windows(steps_of(folder, 1, **options)[0])
    assert steps_of(folder, last[0], place=through_json(place), batch_targets=5 + last[1], **options)[0] == []


@laws
@given(histories, st.integers(1, 3), st.integers(1, 12))
def test_a_resume_on_the_same_ranks_gives_each_its_own_batches(folders, lengths, world_size, num_steps):
    folder = write_dataset(folders(), lengths, users_per_group=1)
    whole, _ = steps_of(folder, world_size, batch_targets=6)
    begun, place = steps_of(folder, world_size, batch_targets=6, num_steps=num_steps)
    rest, _ = steps_of(folder, world_size, batch_targets=6, place=through_json(place))
    assert begun + rest == whole


def test_epochs_and_seeds_differ(folders):
    folder = write_dataset(folders(), [9, 4, 7, 30, 5, 12, 6, 8])
    found = [steps_of(folder, 1, epoch, seed=seed)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert found[0] == found[3] != found[1] != found[2] != found[0]
    chunks = [open_batches(folder, held=2, seed=seed)._chunk(epoch, 0) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, chunks))) > 3  # row groups meet others


def test_a_chunk_goes_to_the_rank_that_is_free(folders):
    """One rank reads a long chunk while the other reads all short ones; only then do batches run out."""
    folder = write_dataset(folders(), [200] + [13] * 20, users_per_group=1)
    steps, _ = steps_of(folder, 2, max_seq_len=10, batch_targets=10)
    assert sum(not batch for step in steps for batch in step) <= 2 * (198 - 1) // 10
    steps, _ = steps_of(write_dataset(folders(), [13] * 20, users_per_group=1), 2, max_seq_len=10, batch_targets=10)
    assert all(batch for step in steps for batch in step)


def test_the_share_done_rises_to_one(folders):
    folder = write_dataset(folders(), [9, 4, 7, 30, 5, 2, 1, 12, 6, 8])
    batches = open_batches(folder, held=2, batch_targets=6)
    places = [START] + [batches.place for _ in batches.epoch(0)]
    shares = [batches.share_done(0, through_json(place)) for place in places]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(0 < after - before < 0.35 for before, after in pairwise(shares))
    num_steps = len(places) - 1
    assert num_steps / 2 <= batches.num_steps(0) <= num_steps
    assert batches.num_steps(0, places[-1]) == 0


@pytest.mark.parametrize("every_position", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_counts_are_those_of_memory_mode(folders, every_position, world_size):
    folder = write_dataset(folders(), [9, 4, 1, 30, 5, 2, 1, 12, 6, 8])
    options = {"every_position": every_position, "reversed_share": 0.3, "reversed_epochs": 1}
    dataset = SequenceDataset.open(folder)
    memory = TrainingBatches(*dataset.train_sequences(), 5, 11, 0, **options)

    def work(ranks):
        batches = open_batches(folder, ranks, **options)
        counts = [batches.target_counts(dataset.num_items, epoch) for epoch in (0, 1, 0)]
        return batches.event_counts(dataset.num_items), counts

    for events, targets in Together(world_size).run(work):
        np.testing.assert_array_equal(events, dataset.train_counts())
        for found, epoch in zip(targets, (0, 1, 0), strict=True):
            np.testing.assert_allclose(found, memory.target_counts(dataset.num_items, epoch), rtol=1e-12)


def test_a_batch_is_looked_up_with_its_users(folders):
    lengths = [9, 4, 1, 30, 5, 2, 1, 12, 6, 8]
    folder = write_dataset(folders(), lengths)
    batches = open_batches(folder, held=2, batch_targets=6)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for batch in batches.epoch(3):
        found, users = batches.look_up(3, *batches.given)
        assert torch.equal(found.item_ids, batch.item_ids)
        assert torch.equal(found.offsets, batch.offsets)
        expected = [int(np.searchsorted(bounds, member[0], side="right")) - 1 for member in members(batch)]
        assert users.tolist() == expected
        assert batches.dataset.users_at(users) == [100 + user for user in expected]


def test_the_fingerprint_is_of_all_that_decides_the_batches(folders):
    lengths = [9, 4, 7, 30, 5, 12]
    folder = write_dataset(folders(), lengths)
    options = [{}, {"held": 2}, {"seed": 1}, {"reversed_share": 0.5, "reversed_epochs": 1}]
    found = [open_batches(folder, **each).fingerprint() for each in options]
    found.append(open_batches(write_dataset(folders(), lengths, users_per_group=3)).fingerprint())
    assert len(set(found)) == len(found)
    assert open_batches(folder, Ranks(1, 2), batch_targets=12).fingerprint() == found[0]  # they only deal the windows out


def test_too_few_row_groups_are_refused(folders):
    folder = write_dataset(folders(), [9, 4, 7, 30])
    with pytest.raises(InputError, match=r"2 row groups, 1 times data.row_groups_held=2, too few for 2 ranks: lower it"):
        open_batches(folder, Ranks(0, 2), held=2)


def test_no_targets(folders):
    batches = open_batches(write_dataset(folders(), [1, 3, 1, 2][:3]))
    with pytest.raises(InputError, match="no training sequence of two items or more"):
        list(batches.epoch(0))


def test_damage_is_named(folders):
    folder = write_dataset(folders(), [9, 4, 7, 30])
    part = folder / "sequences/part-00000.parquet"
    table = pq.read_table(part)
    lists = table["items"].to_pylist()
    lists[3][2] = 99
    bad = table.set_column(1, "items", pa.array(lists, pa.list_(pa.int64())))
    pq.write_table(bad, part, row_group_size=2)
    dataset = RowGroupDataset.open(folder, 1)
    dataset.read([0])
    with pytest.raises(InputError, match=r"part-00000.parquet' holds item index 99 \(user 103, row 4\)"):
        dataset.read([1])
    pq.write_table(table[:3], part, row_group_size=2)
    with pytest.raises(InputError, match="holds 3 users with 20 events, the manifest says 4 with 50"):
        RowGroupDataset.open(folder, 1)
    pq.write_table(table.drop_columns("items"), part)
    with pytest.raises(InputError, match=r"part-00000\.parquet' cannot be read: 'items'"):
        RowGroupDataset.open(folder, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["users_too_short_to_split"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not say how many users are too short to split"):
        RowGroupDataset.open(folder, 1)


def test_a_missing_part_is_named(folders):
    folder = write_dataset(folders(), [9, 4, 7, 30])
    dataset = RowGroupDataset.open(folder, 1)
    (folder / "sequences/part-00000.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00000\.parquet' is missing"):
        dataset.read([0])
    with pytest.raises(InputError, match=r"part-00000\.parquet' is missing"):
        RowGroupDataset.open(folder, 1)


POOLS = []  # what is allocated from a pool must not outlive it


def peak_bytes(work):
    """The most that NumPy and Arrow hold at a time while ``work`` runs."""
    pool, before = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_memory_does_not_grow_with_the_dataset(folders):
    """An epoch and a validation take what they take with an eighth of the row groups; all of it in memory does not."""
    small, large = (write_dataset(folders(), [40] * 4000 * size, 500, 4000) for size in (1, 8))

    def read(folder):
        """The least of three, for caches fill once and Arrow's threads free a column sooner or later."""
        # The vocabulary stays in memory. Here, where every event is an item of its own, it is as large as the data.
        dataset = RowGroupDataset.open(folder, 2)

        def work():
            for _ in RowGroupBatches(dataset, 20, 512, 0).epoch(0):
                pass
            for _ in dataset.case_blocks("valid"):
                pass

        return min(peak_bytes(work) for _ in range(3))

    def hold(folder):
        return peak_bytes(lambda: next(TrainingBatches(*SequenceDataset.open(folder).train_sequences(), 20, 512, 0).epoch(0)))

    assert read(large) < 1.1 * read(small)
    assert hold(large) > 6 * hold(small)


@pytest.fixture(scope="module")
def grouped_dir(dataset_dir, tmp_path_factory):
    """The small dataset in 24 row groups."""
    folder = tmp_path_factory.mktemp("grouped") / "dataset"
    shutil.copytree(dataset_dir, folder)
    for part in (folder / "sequences").iterdir():
        pq.write_table(pq.read_table(part), part, row_group_size=10)
    return folder


READER = ["data.reader=row_groups", "data.row_groups_held=2"]


def train(folder, output, *overrides, resume=False):
    """Train in this process; give the trainer and the losses step by step."""
    output.mkdir(exist_ok=True)
    arguments = [f"data.path={folder}", f"output={output}", *SMALL, "trainer.log_every_steps=1", *overrides]
    config = compose("train", TrainConfig, arguments)
    dataset = RowGroupDataset.open(folder, config.data.row_groups_held)
    with process_group("cpu") as device:
        trainer = Trainer(config, dataset, device)
        if resume:
            trainer.resume()
        trainer.fit()
    return trainer, [(record["step"], record["loss"]) for record in records(output)]


def records(run_dir, kind="train"):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_training_goes_on_to_the_bit(grouped_dir, tmp_path):
    """In the middle of a chunk of the second epoch, with negatives of its batch; not with other chunks."""
    overrides = [*READER, "loss.negatives=mixed", "loss.num_negatives=40", "trainer.max_epochs=2"]
    whole, losses = train(grouped_dir, tmp_path / "whole", *overrides)
    middle = whole.state.step // 2 + 3
    begun, _ = train(grouped_dir, tmp_path / "run", *overrides, f"trainer.max_steps={middle}")
    assert begun.state.epoch == 1
    assert any(chunk and chunk.windows for chunk in begun.state.chunks_begun)
    assert read_state(list_checkpoints(tmp_path / "run")[-1]).place == through_json(begun.state.place)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    _, found = train(grouped_dir, tmp_path / "run", *overrides, resume=True)
    assert found == losses
    with pytest.raises(InputError, match="was written within epoch 2, whose order of reading is another one now"):
        train(grouped_dir, tmp_path / "other", *overrides, "data.row_groups_held=3", resume=True)
    others = ["trainer.batch_targets=300", "optimizer.schedule=linear"]
    other, found = train(grouped_dir, tmp_path / "other", *overrides, *others, resume=True)
    batches = open_batches(grouped_dir, held=2, max_seq_len=20, batch_targets=300)
    rest = list(batches.epoch(1, through_json(begun.state.place)))
    assert [step for step, _ in found] == list(range(1, middle + len(rest) + 1))
    rates = other.learning_rates
    assert 0 < rates.optimizer.param_groups[0]["lr"] < rates.highest[0] / 10  # by the share of the epochs that is done


def test_a_bad_loss_names_users_and_items(grouped_dir, tmp_path):
    with pytest.raises(
        InputError, match=r"batch 1 of epoch 1, at step 1, .*users (.*?) and \d+ more and items (.*?) and"
    ) as error:
        train(grouped_dir, tmp_path / "run", *READER, "trainer.max_loss=0.001")
    batches = open_batches(grouped_dir, held=2, max_seq_len=20, batch_targets=128)
    next(batches.epoch(0))
    batch, users = batches.look_up(0, *batches.given)
    found = re.search(r"users (.*?) and \d+ more and items (.*?) and \d+ more", str(error.value))
    assert set(found[1].split(", ")) <= {str(user) for user in batches.dataset.users_at(users)}
    items = batches.dataset.vocabulary.decode(batch.item_ids.numpy()).to_pylist()
    assert set(found[2].split(", ")) <= {str(item) for item in items}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.reader=disk", "data.reader is 'disk'; it must be one of memory, row_groups"),
        ("data.row_groups_held=0", "data.row_groups_held is 0; it must be at least 1"),
    ],
)
def test_config_errors(override, message):
    with pytest.raises(InputError, match=message):
        compose("train", TrainConfig, ["data.path=x", "output=y", override])


@pytest.mark.parametrize("candidates", ["full", "popularity:20"])
def test_validation_reads_a_few_row_groups_at_a_time(grouped_dir, candidates):
    """The figures are those of all cases at once."""
    in_memory, on_disk = SequenceDataset.open(grouped_dir), RowGroupDataset.open(grouped_dir, 2)
    protocol = Protocol(candidates, split="valid")
    with process_group("cpu") as device:
        config = compose("train", TrainConfig, [f"data.path={grouped_dir}", "output=none", *SMALL])
        model = build_distributed(config, on_disk.num_items, device)
        found, expected = (evaluate(model, dataset, protocol, 20, 7) for dataset in (on_disk, in_memory))
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["num_users"] == 240


@pytest.mark.programs
def test_two_ranks_that_stop_and_one_that_goes_on_train_on_every_target_once(grouped_dir, tmp_path):
    run = tmp_path / "run"
    arguments = [f"data.path={grouped_dir}", f"output={run}", *SMALL, *READER, "trainer.batch_targets=24"]
    arguments += ["trainer.log_every_steps=1", "loss.negatives=popularity", "loss.num_negatives=20"]
    run_program("train", *arguments, "trainer.max_steps=20", nproc=2)
    state = read_state(list_checkpoints(run)[-1])
    assert state.batches_in_epoch == 40
    assert sum(chunk is not None for chunk in state.chunks_begun) == 2
    run_program("train", *arguments, "trainer.max_epochs=1", "trainer.resume=true")
    options = {"held": 2, "max_seq_len": 20, "batch_targets": 24}
    begun, place = steps_of(grouped_dir, 2, num_steps=20, **options)
    assert through_json(place) == state.place
    rest, _ = steps_of(grouped_dir, 1, place=through_json(place), **options)
    sizes = [sum(len(member) - 1 for batch in step for member in batch) for step in begun + rest]
    assert [record["num_targets"] for record in records(run)] == sizes
    assert sum(sizes) == targets_in_memory(grouped_dir).total()
    assert [record["num_users"] for record in records(run, "valid")] == [240, 240]
