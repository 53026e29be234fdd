import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.ops.diagonal_scan import diagonal_scan, diagonal_step, scan_reference


def problem(lengths, features, dtype=torch.float64):
    torch.manual_seed(sum(lengths) + features)
    offsets = offsets_from_lengths(torch.tensor(lengths))
    modulus = torch.empty(features, dtype=torch.float64).uniform_(0.5, 0.99)
    angle = torch.empty(features, dtype=torch.float64).uniform_(0, 6.28)
    decay = torch.stack([modulus * angle.cos(), modulus * angle.sin()])
    inputs = torch.randn(sum(lengths), 2, features, dtype=torch.float64)
    initial = torch.randn(len(lengths), 2, features, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (inputs, decay, initial)], offsets


def gradients(scan, tensors, offsets):
    """Forward and gradients under a loss that weighs every output differently."""
    inputs, decay, initial = tensors
    states, last = scan(inputs, decay, offsets, initial)
    loss = (states * torch.arange(states.numel()).view_as(states).sin()).sum()
    loss = loss + (last * torch.arange(last.numel()).view_as(last).cos()).sum()
    return [states, last, *torch.autograd.grad(loss, tensors, materialize_grads=True)]


@pytest.mark.parametrize(
    ("lengths", "features"),
    [([3, 0, 2], 1), ([0], 3), ([1], 3), ([1, 2, 63, 64, 65, 0, 1], 5), ([200, 7], 48), ([5, 5, 5], 32)],
)
def test_scan_and_its_gradients_equal_the_naive_loop(lengths, features):
    tensors, offsets = problem(lengths, features)
    expected = gradients(scan_reference, tensors, offsets)
    for found, truth in zip(gradients(diagonal_scan, tensors, offsets), expected):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
    single, _ = problem(lengths, features, torch.float32)
    # The naive loop in the same precision sets what may be lost to it.
    for found, naive, truth in zip(
        gradients(diagonal_scan, single, offsets), gradients(scan_reference, single, offsets), expected
    ):
        if truth.numel():
            assert (found - truth).abs().max() <= 2 * (naive - truth).abs().max() + 1e-5


def test_gradcheck():
    (inputs, decay, initial), offsets = problem([2, 0, 4, 1], 2)
    assert torch.autograd.gradcheck(lambda b, d, h: diagonal_scan(b, d, offsets, h), (inputs, decay, initial))


def test_equals_complex_numbers():
    (inputs, decay, initial), offsets = problem([9], 4)
    h = torch.complex(initial[0, 0], initial[0, 1])
    for n, state in enumerate(diagonal_scan(inputs, decay, offsets, initial)[0]):
        h = torch.complex(*decay) * h + torch.complex(*inputs[n])
        torch.testing.assert_close(torch.complex(*state), h, rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_a_batch_equals_its_sequences_one_by_one(lengths):
    (inputs, decay, initial), offsets = problem(lengths, 3)
    states, last = diagonal_scan(inputs, decay, offsets, initial)
    for b, length in enumerate(lengths):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        alone = diagonal_scan(inputs[rows], decay, torch.tensor([0, length]), initial[b : b + 1])
        assert torch.equal(alone[0], states[rows])
        assert torch.equal(alone[1][0], last[b])


def test_steps_continue_a_scan():
    (inputs, decay, initial), _ = problem([6, 6], 5)
    states, last = diagonal_scan(inputs, decay, torch.tensor([0, 6, 12]), initial)
    state = initial
    for n in range(6):
        state = diagonal_step(inputs[[n, 6 + n]], decay, state)
        torch.testing.assert_close(state, states[[n, 6 + n]], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-13, atol=1e-13)


def test_absent_initial_state_is_zero():
    (inputs, decay, initial), offsets = problem([3, 0, 2], 4)
    states, last = diagonal_scan(inputs, decay, offsets)
    zero_states, zero_last = diagonal_scan(inputs, decay, offsets, torch.zeros_like(initial))
    assert torch.equal(states, zero_states)
    assert torch.equal(last, zero_last)
    assert not last[1].any()


def test_scripted_equals_eager():
    (inputs, decay, initial), offsets = problem([3, 0, 2, 70], 4)
    with torch.no_grad():
        for found, expected in zip(
            torch.jit.script(diagonal_scan)(inputs, decay, offsets, initial), diagonal_scan(inputs, decay, offsets, initial)
        ):
            assert torch.equal(found, expected)


def test_inputs_are_left_alone():
    tensors, offsets = problem([3, 0, 2], 4)
    before = [x.detach().clone() for x in tensors]
    gradients(diagonal_scan, tensors, offsets)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))
