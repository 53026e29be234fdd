"""The dense selective GRU's torch code against its naive truth; its kernels are in test_triton.py."""

import pytest
import torch
from torch.testing import assert_close

from glintru_rec.errors import InputError
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights, selective_gru, selective_gru_reference
from tests.test_ops import check_parity, draw, error, offsets_of, run

LENGTHS = [0, 2, 0, 17, 1, 9, 0]


def problem(lengths, width, taps=3):
    """U, the initial state, and all weights."""
    torch.manual_seed(sum(lengths) + width + taps)
    half, matrix = width // 2, width**-0.5
    convolution = [draw(width, width, taps, scale=(width * taps) ** -0.5), draw(width)]
    squares = [draw(3 * width, width, scale=matrix), draw(3 * width, width, scale=matrix), draw(width, width, scale=matrix)]
    gate = [draw(half, width, scale=matrix), draw(half), draw(width, half, scale=half**-0.5), draw(width)]
    last = [draw(width, width, taps, scale=(width * taps) ** -0.5), draw(width)]
    return [draw(sum(lengths), width), draw(len(lengths), width), *convolution, *squares, draw(width), *last, *gate]


def named(tensors):
    return SelectiveGRUWeights(*tensors[:8]), SelectiveGate(*tensors[8:])


def both(offsets, causal):
    """The op and its truth as functions of all tensors."""
    return (
        lambda u, initial, *weights: selective_gru(u, *named(weights), offsets, initial, causal),
        lambda u, initial, *weights: selective_gru_reference(u, *named(weights), offsets, initial, causal=causal),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "width", "taps"), [(LENGTHS, 12, 3), ([1], 8, 4), ([65], 5, 1), ([0, 0], 4, 2), ([], 4, 2)]
)
def test_equals_truth(lengths, width, taps, causal):
    check_parity(*both(offsets_of(lengths), causal), problem(lengths, width, taps))


def test_bf16_is_about_as_near_the_truth_as_naive_code():
    fast, reference = both(offsets_of(LENGTHS), True)
    inputs = [x.bfloat16().double() for x in problem(LENGTHS, 12)]
    truth, naive, found = (
        run(function, inputs, dtype)
        for function, dtype in ((reference, torch.float64), (reference, torch.bfloat16), (fast, torch.bfloat16))
    )
    for part, factor in ((0, 2), (1, 5)):
        for y, y_naive, y_truth in zip(found[part], naive[part], truth[part], strict=True):
            assert error(y, y_truth) <= factor * error(y_naive, y_truth) + 2.0**-8


def test_gradcheck():
    inputs = [x.requires_grad_() for x in problem([3, 0, 2], 2, 2)]
    assert torch.autograd.gradcheck(both(offsets_of([3, 0, 2]), True)[0], inputs)


def test_without_an_initial_state_it_starts_from_zeros():
    u, initial, *weights = problem(LENGTHS, 8)
    weights, gate = named(weights)
    expected = selective_gru_reference(u, weights, gate, offsets_of(LENGTHS), torch.zeros_like(initial))
    assert_close(selective_gru(u, weights, gate, offsets_of(LENGTHS)), expected, rtol=1e-12, atol=1e-12)


def test_dropout_zeroes_and_scales_the_gate():
    """A gate of ones, Φ of ones and a convolution that passes on: what comes out is what dropout multiplies by."""
    u, _, *tensors = problem([4000], 4, 1)
    weights, gate = named(tensors)
    ones, zeros, eye = torch.ones(4).double(), torch.zeros(4, 4).double(), torch.eye(4).double()
    weights = weights._replace(crossing=zeros, crossing_bias=ones, conv_out=eye.unsqueeze(2), conv_out_bias=0 * ones)
    gate = gate._replace(up=zeros[:, :2], up_bias=ones)
    torch.manual_seed(0)
    out, _ = selective_gru(u, weights, gate, offsets_of([4000]), rate=0.25)
    assert_close(out[out != 0], torch.full_like(out[out != 0], 4 / 3), rtol=1e-4, atol=0)
    assert (out == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)  # 16,000 draws: .0034 is one deviation


def test_kernels_are_causal_and_have_a_gate():
    u, _, *tensors = problem([3], 4)
    weights, gate = named(tensors)
    for causal, given in ((False, gate), (True, None)):
        with pytest.raises(InputError, match="whose kernels are causal and have a gate"):
            selective_gru(u, weights, given, offsets_of([3]), causal=causal, implementation="triton")
    for unknown in ("cuda", "triton"):  # there is neither on a CPU
        with pytest.raises(InputError, match=f"implementation is '{unknown}'"):
            selective_gru(u, weights, gate, offsets_of([3]), implementation=unknown)
