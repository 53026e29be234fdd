import itertools
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glintru_rec.data.batches import START, TrainingBatches
from glintru_rec.encoders import Encoder
from glintru_rec.errors import InputError
from glintru_rec.model import SequenceModel

# Sequences of one item and of none are in a dataset too; at least one has a target.
histories = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)
laws = settings(max_examples=60, deadline=None)


def make(lengths, max_seq_len=5, batch_targets=11, seed=0, **options):
    """Sequence u holds the items 1000 u, 1000 u + 1, …: an item tells where it was."""
    items = np.concatenate([1000 * u + np.arange(length) for u, length in enumerate(lengths)]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TrainingBatches(items, offsets, max_seq_len, batch_targets, seed, **options)


def members(batch):
    return [part.tolist() for part in batch.item_ids.tensor_split(batch.offsets[1:-1])] if len(batch.offsets) > 1 else []


def epoch_of_all_ranks(epoch, world_size, lengths, **options):
    """Batches of one epoch, rank by rank."""
    return [list(make(lengths, rank=rank, world_size=world_size, **options).epoch(epoch)) for rank in range(world_size)]


def windows(batches):
    return [member for rank in batches for batch in rank for member in members(batch)]


def targets(lengths):
    return Counter(1000 * u + n for u, length in enumerate(lengths) for n in range(1, length))


def consecutive(member):
    return member == list(range(member[0], member[0] + len(member)))


@laws
@given(histories, st.integers(1, 9), st.integers(0, 20), st.integers(1, 4), st.integers(0, 3))
def test_every_item_but_the_first_is_a_target_once(lengths, max_seq_len, slack, world_size, epoch):
    batch_targets = max_seq_len + slack
    batches = epoch_of_all_ranks(epoch, world_size, lengths, max_seq_len=max_seq_len, batch_targets=batch_targets)
    found = windows(batches)
    assert all(consecutive(member) for member in found)  # contexts are the true preceding items
    assert Counter(item for member in found for item in member[1:]) == targets(lengths)
    assert all(1 <= len(member) - 1 <= max_seq_len for member in found)
    assert all(sum(len(member) - 1 for member in members(batch)) <= batch_targets for rank in batches for batch in rank)
    assert len({len(rank) for rank in batches}) == 1
    assert make(lengths, max_seq_len, batch_targets, world_size=world_size).num_steps(epoch) == len(batches[0])


@laws
@given(histories, st.integers(1, 9), st.integers(0, 20))
def test_a_window_starts_where_the_one_before_it_ends(lengths, max_seq_len, slack):
    """Only a sequence's first and last windows may be short: no context is lost that would fit."""
    found = windows(epoch_of_all_ranks(0, 1, lengths, max_seq_len=max_seq_len, batch_targets=max_seq_len + slack))
    for u, length in enumerate(lengths):
        own = sorted(member for member in found if member[0] // 1000 == u)
        assert [member[0] for member in own[1:]] == [member[-1] for member in own[:-1]]
        assert all(len(member) - 1 == max_seq_len for member in own[1:-1])
        if 1 < length <= max_seq_len + 1:
            assert len(own) == 1


@laws
@given(histories, st.integers(1, 9), st.integers(0, 20), st.integers(1, 4), st.integers(0, 3))
def test_one_target_a_sequence(lengths, max_seq_len, slack, world_size, epoch):
    batch_targets = 1 + slack
    batches = epoch_of_all_ranks(
        epoch, world_size, lengths, max_seq_len=max_seq_len, batch_targets=batch_targets, every_position=False
    )
    found = windows(batches)
    assert all(consecutive(member) for member in found)
    assert sorted(member[-1] // 1000 for member in found) == [u for u, length in enumerate(lengths) if length > 1]
    for member in found:
        assert len(member) - 1 == min(member[-1] % 1000, max_seq_len)  # all items before it, or the latest that fit
    assert all(len(members(batch)) <= batch_targets for rank in batches for batch in rank)
    assert len({len(rank) for rank in batches}) == 1
    options = {"world_size": world_size, "every_position": False}
    assert make(lengths, max_seq_len, batch_targets, **options).num_steps(epoch) == len(batches[0])


@pytest.mark.parametrize("reversed_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("every_position", [True, False])
def test_target_counts(every_position, reversed_share):
    """What an epoch's targets are in the mean over many, within 5 sigma; exactly, where nothing is left to chance."""
    lengths, epochs = [1, 2, 0, 3, 13, 7], 1000
    batches = make(lengths, every_position=every_position, reversed_share=reversed_share, reversed_epochs=epochs)
    found = np.zeros((epochs, 6000))
    for epoch in range(epochs):
        for member in windows([list(batches.epoch(epoch))]):
            np.add.at(found[epoch], member[1:] if every_position else member[-1:], 1)
    sigma = found.std(0) / epochs**0.5
    assert (np.abs(found.mean(0) - batches.target_counts(6000, 0)) <= 5 * sigma + 1e-12).all()
    assert sigma.any() != (every_position and reversed_share in (0, 1))
    in_order = make(lengths, every_position=every_position)
    np.testing.assert_array_equal(batches.target_counts(6000, epochs), in_order.target_counts(6000, 0))


def test_prefixes_end_anywhere():
    batches = make([4], every_position=False)
    ends = Counter(members(next(batches.epoch(epoch)))[0][-1] for epoch in range(60))
    assert set(ends) == {1, 2, 3}


def test_cuts_fall_anywhere():
    batches = make([12], max_seq_len=5)
    firsts = {min(window[-1] for window in windows([list(batches.epoch(epoch))])) for epoch in range(60)}
    assert firsts == {1, 2, 3, 4, 5}


def as_lists(batches):
    return [members(batch) for batch in batches]


@laws
@given(histories, st.booleans(), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_repeats_exactly_and_goes_on_from_any_step(lengths, every_position, world_size, first_step):
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "every_position": every_position}
        batches = make(lengths, **options)
        whole = as_lists(batches.epoch(2))
        assert as_lists(make(lengths, **options).epoch(2)) == whole
        assert as_lists(batches.epoch(2, place_after(batches, 2, first_step))) == whole[first_step:]
        list(batches.epoch(0))
        assert as_lists(batches.epoch(2)) == whole


def place_after(batches, epoch, num_steps):
    """Where an epoch stands after some steps."""
    steps = batches.epoch(epoch)
    return [START, *(batches.place for _ in itertools.islice(steps, num_steps))][-1]


@laws
@given(
    histories,
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 40)), max_size=3),
    st.tuples(st.integers(1, 4), st.integers(0, 40)),
)
def test_resumed_on_other_ranks_with_other_batches_an_epoch_skips_and_repeats_nothing(lengths, every_position, parts, last):
    """Some steps on some ranks with batches of some size, again and again, and the rest: each window of the epoch once."""
    whole = windows(epoch_of_all_ranks(1, 1, lengths, every_position=every_position))
    place, consumed = START, []
    for world_size, num_steps, slack in [*((size, steps, slack) for size, steps, slack in parts), (last[0], None, last[1])]:
        options = {"batch_targets": 5 + slack, "every_position": every_position, "world_size": world_size}
        readers = [make(lengths, rank=rank, **options) for rank in range(world_size)]
        given = [list(itertools.islice(reader.epoch(1, place), num_steps)) for reader in readers]
        assert num_steps is not None or {len(batches) for batches in given} == {readers[0].num_steps(1, place)}
        consumed += windows(given)
        place = readers[0].place if given[0] else place
        assert {reader.place for reader in readers if given[0]} <= {place}
    assert Counter(map(tuple, consumed)) == Counter(map(tuple, whole))
    assert readers[0].share_done(1, place) == 1


@laws
@given(histories, st.booleans(), st.sampled_from([0.0, 0.5]))
def test_a_batch_is_looked_up_with_its_sequences(lengths, every_position, share):
    batches = make(lengths, every_position=every_position, reversed_share=share, reversed_epochs=2)
    assert batches.num_batches(1) == batches.num_steps(1)
    for batch in batches.epoch(1):
        found, sequences = batches.look_up(1, *batches.given)
        assert torch.equal(found.item_ids, batch.item_ids)
        assert torch.equal(found.offsets, batch.offsets)
        assert sequences.tolist() == [member[0] // 1000 for member in members(batch)]  # see `make`


@pytest.mark.parametrize("every_position", [True, False])
def test_epochs_and_seeds_differ(every_position):
    lengths = [5, 9, 2, 30, 7, 3, 17, 4]
    epochs = [
        as_lists(make(lengths, seed=seed, every_position=every_position).epoch(e)) for seed, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    if not every_position:
        return
    cuts = [sorted(member for batch in epoch for member in batch) for epoch in epochs]
    assert cuts[0] != cuts[1]  # not only their order


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_are_the_one_rank_batches_dealt_out(world_size):
    lengths = [5, 9, 2, 30, 7, 3, 17, 4]
    alone = as_lists(make(lengths).epoch(1))
    ranks = [as_lists(rank) for rank in epoch_of_all_ranks(1, world_size, lengths)]
    dealt = [batch for step in zip(*ranks) for batch in step]
    assert dealt[: len(alone)] == alone
    assert dealt[len(alone) :] == [[]] * (-len(alone) % world_size)


def test_a_batch_is_as_full_as_it_can_be():
    lengths = [5, 9, 2, 30, 7, 3, 17, 4]
    sizes = [[len(member) - 1 for member in batch] for batch in as_lists(make(lengths, batch_targets=11).epoch(0))]
    for batch, following in pairwise(sizes):
        assert sum(batch) + following[0] > 11


@pytest.mark.parametrize("every_position", [True, False])
def test_tensors_are_int64(every_position):
    for rank in range(2):
        for batch in make([2], rank=rank, world_size=2, every_position=every_position).epoch(0):
            assert batch.item_ids.dtype == batch.offsets.dtype == torch.int64
            assert batch.offsets[0] == 0
            assert batch.offsets[-1] == batch.item_ids.numel()


class Passing(Encoder):
    causal = True
    width = 1

    def forward(self, x, offsets):
        return x


class PlainTable(nn.Module):
    def __init__(self, num_items):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items, 1, dtype=torch.float64))

    def forward(self, item_ids, more_ids):
        return self.weight[item_ids], self.weight[more_ids]


@laws
@given(histories, st.integers(1, 9), st.integers(0, 60), st.integers(1, 3))
def test_every_target_weighs_the_same(lengths, max_seq_len, slack, world_size):
    """Over an epoch of all ranks, the gradients of its loss at each target's vector sum to 1 / batch_targets."""
    batch_targets = max_seq_len + slack
    place = {
        item: row for row, item in enumerate(sorted(1000 * u + n for u, length in enumerate(lengths) for n in range(length)))
    }
    model = SequenceModel(PlainTable(len(place)), Passing())
    for rank in epoch_of_all_ranks(0, world_size, lengths, max_seq_len=max_seq_len, batch_targets=batch_targets):
        for batch in rank:
            rows = torch.tensor([place[item] for item in batch.item_ids.tolist()], dtype=torch.int64)
            losses = model(rows, batch.offsets, rows[:0]).positive.sum(1)
            (losses.sum() / batch_targets).backward()
    expected = torch.tensor([[float(item % 1000 > 0)] for item in place], dtype=torch.float64) / batch_targets
    torch.testing.assert_close(model.table.weight.grad, expected, rtol=1e-12, atol=0)


def test_a_window_must_fit_into_a_batch():
    with pytest.raises(InputError, match=r"trainer.batch_targets is 4, less than data.max_seq_len 5"):
        make([9], max_seq_len=5, batch_targets=4)
    make([9], max_seq_len=5, batch_targets=4, every_position=False)


@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 0]])
def test_no_targets(lengths):
    items, offsets = np.zeros(sum(lengths), np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with pytest.raises(InputError, match="no training sequence of two items or more"):
        TrainingBatches(items, offsets, 5, 10, 0)


@laws
@given(histories, st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.4, 1.0]))
def test_backwards_is_the_same_windows_turned(lengths, max_seq_len, first_step, share):
    """In the first epochs only; nothing else of an epoch changes, and a resumed one sees the same."""
    options = {"reversed_share": share, "reversed_epochs": 2}
    for epoch in (1, 2):
        plain = make(lengths, max_seq_len, max_seq_len + 9).epoch(epoch)
        turned = list(make(lengths, max_seq_len, max_seq_len + 9, **options).epoch(epoch))
        for before, after in zip(plain, turned, strict=True):
            assert torch.equal(before.offsets, after.offsets)
            for member, other in zip(members(before), members(after), strict=True):
                both = [member, member[::-1]]
                assert other in ({0.0: both[:1], 0.4: both, 1.0: both[1:]}[share] if epoch < 2 else both[:1])
        batches = make(lengths, max_seq_len, max_seq_len + 9, **options)
        resumed = list(batches.epoch(epoch, place_after(batches, epoch, first_step)))
        assert all(torch.equal(a.item_ids, b.item_ids) for a, b in zip(turned[first_step:], resumed, strict=True))
