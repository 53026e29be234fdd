import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from glintru_rec.jagged import (
    keep_last,
    last_items,
    last_of_each,
    lengths_from_offsets,
    offsets_from_lengths,
    positions,
    sequence_index,
)

lengths_lists = st.lists(st.integers(0, 7), max_size=8)


def make(lengths, width=3):
    offsets = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))
    values = torch.arange(1.0, 1 + sum(lengths) * width).view(-1, width)
    return values, offsets


def equal(result, expected):
    assert_close(result, torch.tensor(expected, dtype=torch.int64), rtol=0, atol=0)


def test_worked_example():
    lengths = torch.tensor([3, 0, 2])
    offsets = offsets_from_lengths(lengths)
    equal(offsets, [0, 3, 3, 5])
    equal(lengths_from_offsets(offsets), [3, 0, 2])
    equal(sequence_index(offsets, 5), [0, 0, 0, 2, 2])
    equal(positions(offsets, 5), [0, 1, 2, 0, 1])
    hidden = torch.arange(10.0).view(5, 2)
    assert last_of_each(hidden, offsets).tolist() == [[4.0, 5.0], [0.0, 0.0], [8.0, 9.0]]
    values, kept = keep_last(hidden, offsets, 2)
    assert values.tolist() == hidden[[1, 2, 3, 4]].tolist()
    equal(kept, [0, 2, 2, 4])


@settings(max_examples=60, deadline=None)
@given(lengths_lists)
def test_offsets_and_lengths_are_inverse(lengths):
    offsets = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))
    equal(offsets, [sum(lengths[:b]) for b in range(len(lengths) + 1)])
    equal(lengths_from_offsets(offsets), lengths)


@settings(max_examples=60, deadline=None)
@given(lengths_lists)
def test_index_and_positions_count_every_item(lengths):
    _, offsets = make(lengths)
    equal(sequence_index(offsets, sum(lengths)), [b for b, length in enumerate(lengths) for _ in range(length)])
    equal(positions(offsets, sum(lengths)), [n for length in lengths for n in range(length)])


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 9))
def test_last_of_each_and_keep_last_against_slices(lengths, max_length):
    values, offsets = make(lengths)
    members = list(values.split(lengths)) if lengths else []
    last = last_of_each(values, offsets)
    assert last.tolist() == [member[-1].tolist() if len(member) else [0.0] * 3 for member in members]
    kept, kept_offsets = keep_last(values, offsets, max_length)
    assert kept.tolist() == [row for member in members for row in member[-max_length:].tolist()]
    equal(lengths_from_offsets(kept_offsets), [min(length, max_length) for length in lengths])


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(0, 9))
def test_last_items_against_slices(lengths, count):
    values, offsets = make(lengths)
    members = values.split(lengths) if lengths else []
    result = last_items(values, offsets, count)
    assert result.shape == (len(lengths), count, 3)
    for window, member in zip(result, members):
        kept = min(count, len(member))
        assert torch.equal(window[count - kept :], member[len(member) - kept :])
        assert not window[: count - kept].any()


def test_keep_last_of_ids_keeps_them_exact():
    ids = torch.tensor([2**24 + 1, 2**53 + 1, 2**62 + 1])
    kept, _ = keep_last(ids, torch.tensor([0, 3]), 2)
    equal(kept, [2**53 + 1, 2**62 + 1])


def test_offsets_are_int64_whatever_the_lengths_are():
    offsets = offsets_from_lengths(torch.full((3,), 2**30, dtype=torch.int32))
    equal(offsets, [0, 2**30, 2**31, 3 * 2**30])


def test_last_of_each_sends_its_gradient_to_the_last_rows():
    hidden = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 5])
    last_of_each(hidden, offsets).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 4, 0], [1, 2, 3]])
def test_scripted_equals_eager(lengths):
    values, offsets = make(lengths)
    for function in (last_of_each, keep_last):
        arguments = (values, offsets) if function is last_of_each else (values, offsets, 2)
        assert_close(torch.jit.script(function)(*arguments), function(*arguments), rtol=0, atol=0)
    for function in (sequence_index, positions):
        assert_close(torch.jit.script(function)(offsets, len(values)), function(offsets, len(values)), rtol=0, atol=0)
