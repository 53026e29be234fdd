"""Operators against their naive float64 truth: forward and every gradient, at odd sizes."""

import pytest
import torch
from torch.testing import assert_close

from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import sampled_softmax
from glintru_rec.ops.conv import conv_reference, ragged_conv1d
from glintru_rec.ops.diagonal_scan import diagonal_scan, scan_reference
from glintru_rec.ops.gru import gru_reference, ragged_gru
from glintru_rec.ops.linear_attention import attention_reference, continue_attention, linear_attention
from glintru_rec.ops.normalized_attention import normalized_attention, normalized_attention_reference
from glintru_rec.ops.rows import gather_rows, scatter_rows
from glintru_rec.ops.softmax_attention import softmax_attention, softmax_reference
from glintru_rec.ops.time_major import time_major

SIZES = [0, 1, 2, 63, 64, 65, 200]
BATCHES = [[n] for n in SIZES] + [[0, 2, 0, 65, 1, 200, 63, 0, 64, 2, 0]]
TINY = [[3, 0, 4, 1], [0, 0], [1]]
# Above the reference's own rounding error, in units of the largest value.
FLOOR = 1e-6


def offsets_of(lengths):
    return offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def draw(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def run(function, inputs, dtype):
    """Outputs, and the gradients of every input under fixed random output gradients."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights)) + sum(0 * x.sum() for x in leaves)  # reaches every leaf
    gradients = torch.autograd.grad(total, leaves)
    return [y.detach() for y in outputs], list(gradients)


def error(result, truth):
    """Largest difference, in units of the truth's largest value."""
    assert result.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    return ((result.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def check_parity(fast, reference, inputs):
    """Equal to the truth in float64; in float32 at most 2x (forward), 5x (backward) the reference's own error."""
    truth = run(reference, inputs, torch.float64)
    exact, single, naive = (
        run(fast, inputs, torch.float64),
        run(fast, inputs, torch.float32),
        run(reference, inputs, torch.float32),
    )
    for part, factor in ((0, 2), (1, 5)):
        assert len(exact[part]) == len(truth[part])
        for y_exact, y_single, y_naive, y_truth in zip(exact[part], single[part], naive[part], truth[part]):
            assert y_exact.dtype == torch.float64
            assert y_single.dtype == torch.float32
            assert error(y_exact, y_truth) <= 1e-12
            assert error(y_single, y_truth) <= factor * error(y_naive, y_truth) + FLOOR


def gru_inputs(lengths, width):
    torch.manual_seed(sum(lengths) + width)
    return [draw(sum(lengths), 3 * width), draw(3 * width, width, scale=width**-0.5), draw(len(lengths), width)]


def conv_inputs(lengths, width, taps, width_out=None):
    torch.manual_seed(sum(lengths) + width + taps)
    width_out = width_out or width
    return [draw(sum(lengths), width), draw(width_out, width, taps, scale=(width * taps) ** -0.5), draw(width_out)]


def attention_inputs(lengths, width, heads):
    torch.manual_seed(sum(lengths) + width)
    return [draw(sum(lengths), heads, width // heads) for _ in range(3)]


def sizes(batches):
    """Every single length at one width, the mixed batch (the last) at all widths."""
    return [(lengths, 48) for lengths in batches[:-1]] + [(batches[-1], width) for width in (32, 48, 96)]


@pytest.mark.parametrize(("lengths", "width"), sizes(BATCHES))
def test_gru_equals_truth(lengths, width):
    offsets = offsets_of(lengths)
    check_parity(
        lambda gates, weight, initial: ragged_gru(gates, weight, offsets, initial),
        lambda gates, weight, initial: gru_reference(gates, weight, offsets, initial),
        gru_inputs(lengths, width),
    )


@pytest.mark.parametrize("lengths", [BATCHES[-1], [65], [0, 0]])
def test_gru_starts_from_zeros(lengths):
    offsets = offsets_of(lengths)
    gates, weight, initial = gru_inputs(lengths, 32)
    check_parity(
        lambda gates, weight: ragged_gru(gates, weight, offsets),
        lambda gates, weight: gru_reference(gates, weight, offsets, torch.zeros_like(initial, dtype=gates.dtype)),
        [gates, weight],
    )


def test_gru_equals_torch():
    lengths = [5, 9, 1]
    gru = torch.nn.GRU(6, 8, bias=False).double()
    x = draw(sum(lengths), 6)
    hidden, last = ragged_gru(x @ gru.weight_ih_l0.t(), gru.weight_hh_l0, offsets_of(lengths))
    expected = [gru(member) for member in x.split(lengths)]
    assert_close(hidden, torch.cat([y for y, _ in expected]), rtol=1e-12, atol=1e-12)
    assert_close(last, torch.cat([h for _, h in expected]), rtol=1e-12, atol=1e-12)


def test_gru_last_state():
    lengths = [3, 0, 5, 0, 1]
    gates, weight, initial = gru_inputs(lengths, 4)
    hidden, last = ragged_gru(gates, weight, offsets_of(lengths), initial)
    assert torch.equal(last[[0, 2, 4]], hidden[[2, 7, 8]])
    assert torch.equal(last[[1, 3]], initial[[1, 3]])


def test_gru_goes_on_from_its_last_state():
    gates, weight, initial = gru_inputs([9], 8)
    whole, end = ragged_gru(gates, weight, offsets_of([9]), initial)
    first, middle = ragged_gru(gates[:4], weight, offsets_of([4]), initial)
    second, last = ragged_gru(gates[4:], weight, offsets_of([5]), middle)
    assert_close(torch.cat([first, second]), whole, rtol=1e-13, atol=1e-13)
    assert_close(last, end, rtol=1e-13, atol=1e-13)


def test_gru_leaves_its_inputs_alone():
    inputs = gru_inputs([3, 0, 5], 4)
    before = [x.clone() for x in inputs]
    gates, weight, initial = [x.requires_grad_() for x in inputs]
    hidden, last = ragged_gru(gates, weight, offsets_of([3, 0, 5]), initial)
    grads = [torch.ones_like(hidden), torch.ones_like(last)]
    torch.autograd.backward([hidden, last], grads)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))
    assert all(bool((grad == 1).all()) for grad in grads)


# The mixed batch at every number of taps, every size at the usual three.
CONV_SIZES = [(*size, 3) for size in sizes(BATCHES)] + [(BATCHES[-1], 32, taps) for taps in (1, 2, 4, 5)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "width", "taps"), CONV_SIZES)
def test_conv_equals_truth(lengths, width, taps, causal):
    offsets = offsets_of(lengths)
    check_parity(
        lambda x, weight, bias: ragged_conv1d(x, weight, bias, offsets, causal),
        lambda x, weight, bias: conv_reference(x, weight, bias, offsets, causal),
        conv_inputs(lengths, width, taps),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_conv_equals_torch(length, taps, causal):
    x, weight, bias = conv_inputs([length], 4, taps, width_out=6)
    left = taps - 1 if causal else (taps - 1) // 2
    padded = torch.nn.functional.pad(x.t(), [left, taps - 1 - left])
    expected = torch.nn.functional.conv1d(padded.unsqueeze(0), weight, bias).squeeze(0).t()
    assert_close(ragged_conv1d(x, weight, bias, offsets_of([length]), causal), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", BATCHES)
def test_depthwise_conv_equals_truth(lengths, taps, causal):
    offsets, (x, weight, bias) = offsets_of(lengths), conv_inputs(lengths, 12, taps)
    check_parity(
        lambda x, weight, bias: ragged_conv1d(x, weight, bias, offsets, causal),
        lambda x, weight, bias: conv_reference(x, weight, bias, offsets, causal),
        [x, weight[:, :1].contiguous(), bias],
    )


def test_conv_refuses_what_fits_neither_kind():
    with pytest.raises(InputError, match=r"weight \[6, 3, 2\] and x \[3, 4\] fit neither"):
        ragged_conv1d(draw(3, 4), draw(6, 3, 2), draw(6), offsets_of([3]), True)
    with pytest.raises(InputError, match="whose kernels are causal, and causal is False"):
        ragged_conv1d(draw(3, 4), draw(6, 4, 2), draw(6), offsets_of([3]), False, "triton")


@pytest.mark.parametrize("causal", [True, False])
def test_conv_keeps_overflow_in_its_own_sequence(causal):
    x, weight, bias = conv_inputs([2, 2, 2], 4, 3)
    x[2:4] = torch.inf
    out = ragged_conv1d(x, weight, bias, offsets_of([2, 2, 2]), causal)
    assert bool(out[[0, 1, 4, 5]].isfinite().all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize(("lengths", "width"), sizes(BATCHES))
def test_attention_equals_truth(lengths, width, chunk_size, causal):
    offsets = offsets_of(lengths)
    check_parity(
        lambda q, k, v: linear_attention(q, k, v, offsets, causal, chunk_size),
        lambda q, k, v: attention_reference(q, k, v, offsets, causal),
        attention_inputs(lengths, width, heads=4),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "chunk_size"), [([40, 0, 17, 5], 16), ([5, 4], 16), ([16, 32], 16), ([3, 2], 1)])
def test_attention_ignores_what_else_is_in_the_batch(lengths, chunk_size, causal):
    """To the last bit: chunks start at each sequence's own first item."""
    inputs = attention_inputs(lengths, 8, heads=2)
    other = [x.clone() for x in inputs]
    for x in other:
        x[: lengths[0]] = torch.nan
    changed, plain = [linear_attention(*x, offsets_of(lengths), causal, chunk_size) for x in (other, inputs)]
    assert torch.equal(changed[lengths[0] :], plain[lengths[0] :])


def continue_reference(q, k, v, offsets, initial):
    """The truth: q_nᵀ (initial + Σ k vᵀ), one position after another, and the sum at the end."""
    out, last = [v[:0]], []
    for b, state in enumerate(initial):
        for n in range(int(offsets[b]), int(offsets[b + 1])):
            state = state + k[n].unsqueeze(2) * v[n].unsqueeze(1)
            out.append((q[n].unsqueeze(1) @ state).squeeze(1).unsqueeze(0))
        last.append(state)
    return torch.cat(out), torch.stack(last)


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize(("lengths", "width"), sizes(BATCHES))
def test_continued_attention_equals_truth(lengths, width, chunk_size):
    offsets, d = offsets_of(lengths), width // 4
    q, k, v = attention_inputs(lengths, width, heads=4)
    check_parity(
        lambda q, k, v, initial: continue_attention(q, k, v, offsets, initial, chunk_size),
        lambda q, k, v, initial: continue_reference(q, k, v, offsets, initial),
        [q, k, v, draw(len(lengths), 4, d, d)],
    )


EMPTY = [[], [0], [0, 0, 0]]


@pytest.mark.parametrize("lengths", EMPTY)
def test_empty_batches_of_the_gru(lengths):
    offsets, width = offsets_of(lengths), 8
    (hidden, last), gradients = run(lambda g, w, h: ragged_gru(g, w, offsets, h), gru_inputs(lengths, width), torch.float64)
    assert hidden.shape == (0, width)
    assert torch.equal(last, gru_inputs(lengths, width)[2])
    assert torch.equal(gradients[1], torch.zeros(3 * width, width, dtype=torch.float64))
    assert gradients[2].shape == (len(lengths), width)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", EMPTY)
def test_empty_batches_without_a_state(lengths, causal):
    offsets = offsets_of(lengths)
    (out,), gradients = run(lambda *x: ragged_conv1d(*x, offsets, causal), conv_inputs(lengths, 8, 3, 6), torch.float64)
    assert out.shape == (0, 6)
    assert [gradient.shape for gradient in gradients] == [(0, 8), (6, 8, 3), (6,)]
    assert not gradients[1].any()
    assert not gradients[2].any()
    (out,), gradients = run(lambda *x: linear_attention(*x, offsets, causal), attention_inputs(lengths, 8, 2), torch.float64)
    assert out.shape == (0, 2, 4)
    assert [gradient.shape for gradient in gradients] == [(0, 2, 4)] * 3


@pytest.mark.parametrize("lengths", TINY)
def test_gradcheck(lengths):
    offsets = offsets_of(lengths)

    def holds(function, inputs):
        return torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])

    def conv_holds(taps, causal):
        return holds(lambda *x: ragged_conv1d(*x, offsets, causal), conv_inputs(lengths, 2, taps, width_out=3))

    def attention_holds(chunk_size, causal):
        return holds(lambda *x: linear_attention(*x, offsets, causal, chunk_size), attention_inputs(lengths, 4, 2))

    def depthwise_holds(taps, causal):
        x, weight, bias = conv_inputs(lengths, 2, taps)
        return holds(lambda *x: ragged_conv1d(*x, offsets, causal), [x, weight[:, :1].contiguous(), bias])

    assert holds(lambda gates, weight, initial: ragged_gru(gates, weight, offsets, initial), gru_inputs(lengths, 3))
    assert holds(lambda gates, weight: ragged_gru(gates, weight, offsets)[0], gru_inputs(lengths, 3)[:2])
    for causal in (True, False):
        assert all(conv_holds(taps, causal) and depthwise_holds(taps, causal) for taps in (1, 2, 3))
        assert all(attention_holds(chunk_size, causal) for chunk_size in (1, 2, 16))


def test_rows():
    torch.manual_seed(0)
    x, rows = draw(6, 2, 3), torch.tensor([4, 0, 5])
    assert torch.equal(gather_rows(x, rows), x[rows])
    scattered = scatter_rows(x[:3], rows, 6)
    assert torch.equal(scattered[rows], x[:3])
    assert not scattered[[1, 2, 3]].any()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows), [x.requires_grad_()])
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, rows), [x])
    y = draw(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: scatter_rows(y, rows, 6), [y])
    assert torch.autograd.gradgradcheck(lambda y: scatter_rows(y, rows, 6), [y])
    none = torch.empty(0, dtype=torch.int64)
    assert gather_rows(x, none).shape == (0, 2, 3)
    assert torch.equal(scatter_rows(x[:0], none, 4), torch.zeros(4, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [*BATCHES, *TINY, *EMPTY, [2, 5, 2, 5, 0]])
def test_time_major(lengths):
    layout = time_major(offsets_of(lengths), sum(lengths))
    ranking = sorted(range(len(lengths)), key=lambda b: -lengths[b])  # stable: equal lengths keep the batch's order
    starts = offsets_of(lengths).tolist()
    rows = [starts[b] + t for t in range(max(lengths, default=0)) for b in ranking if t < lengths[b]]
    assert layout.ranking.tolist() == ranking
    assert layout.rows.tolist() == rows
    assert layout.alive == [sum(t < length for length in lengths) for t in range(max(lengths, default=0))]
    assert layout.places[layout.rows].tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("lengths", [[3, 0, 17, 1, 40], [1], *EMPTY])
def test_scripted_equals_eager(lengths):
    offsets, num_items = offsets_of(lengths), sum(lengths)

    def same(function, *arguments):
        assert_close(torch.jit.script(function)(*arguments), function(*arguments), rtol=1e-13, atol=1e-13)

    gates, weight, initial = gru_inputs(lengths, 4)
    same(ragged_gru, gates, weight, offsets, initial)
    same(ragged_gru, gates, weight, offsets)
    for causal in (True, False):
        same(linear_attention, *attention_inputs(lengths, 8, 2), offsets, causal)
        for taps in (1, 2, 3):
            x, kernel, bias = conv_inputs(lengths, 4, taps)
            same(ragged_conv1d, x, kernel, bias, offsets, causal)
            same(ragged_conv1d, x, kernel[:, :1].contiguous(), bias, offsets, causal)
    rows = torch.randperm(num_items)
    x = draw(num_items, 2, 3)
    same(gather_rows, x, rows[: num_items // 2])
    same(scatter_rows, x, rows, num_items + 3)
    scripted, eager = torch.jit.script(time_major)(offsets, num_items), time_major(offsets, num_items)
    assert scripted.alive == eager.alive
    for name in ("rows", "places", "ranking"):
        assert torch.equal(getattr(scripted, name), getattr(eager, name))


def test_scripted_gru_leaves_its_inputs_alone():
    inputs = gru_inputs([3, 0, 5], 4)
    before = [x.clone() for x in inputs]
    torch.jit.script(ragged_gru)(inputs[0], inputs[1], offsets_of([3, 0, 5]), inputs[2])
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_a_row_of_100_000_items_stays_finite():
    lengths = [100_000]
    with torch.no_grad():
        gates, weight, _ = [x.float() for x in gru_inputs(lengths, 4)]
        hidden, last = ragged_gru(gates, weight, offsets_of(lengths))
        assert bool(hidden.isfinite().all())
        assert torch.equal(last, hidden[-1:])
        q, k, v = [torch.nn.functional.normalize(x, dim=2) for x in attention_inputs(lengths, 8, 2)]
        out = linear_attention(q.float(), k.float(), v.float(), offsets_of(lengths), True)
        assert bool(out.isfinite().all())
        final = torch.einsum("hi,hij->hj", q[-1], torch.einsum("mhi,mhj->hij", k, v))  # in float64
        assert_close(out[-1].double(), final, rtol=0, atol=1e-5 * len(q) ** 0.5)
        x, kernel, bias = [x.float() for x in conv_inputs(lengths, 4, 3)]
        assert bool(ragged_conv1d(x, kernel, bias, offsets_of(lengths), True).isfinite().all())


def long_row(width):
    torch.manual_seed(0)
    return torch.randn(100_000, width, requires_grad=True), offsets_of([100_000])


def gradient_is_finite(out, x):
    return bool(torch.autograd.grad(out.square().sum(), x)[0].isfinite().all())


def test_the_scan_over_100_000_items():
    """|λ| from .9 to .999: the last state is a sum over thousands of items."""
    x, offsets = long_row(8)
    decay = torch.polar(torch.linspace(0.9, 0.999, 4, dtype=torch.float64), torch.linspace(0, 3, 4, dtype=torch.float64))
    with torch.no_grad():  # backward the same loop runs over as many steps
        _, last = diagonal_scan(x.view(-1, 2, 4), torch.stack([decay.real, decay.imag]).float(), offsets)
    powers = decay ** torch.arange(len(x) - 1, -1, -1).unsqueeze(1)
    truth = (powers * torch.complex(*x.detach().double().view(-1, 2, 4).unbind(1))).sum(0)
    assert_close(torch.complex(*last[0].double()), truth, rtol=0, atol=1e-4 * truth.abs().max().item())


def test_normalized_attention_over_100_000_items():
    x, offsets = long_row(8)
    q, k, v = x.exp().view(-1, 2, 4), (-x).exp().view(-1, 2, 4), x.view(-1, 2, 4)
    out = normalized_attention(q, k, q, k, v, offsets, True, 1e-6)
    weights = torch.einsum("hi,mhi->mh", q[-1].double(), k.double())
    truth = torch.einsum("mh,mhj->hj", weights, v.double()) / weights.sum(0).unsqueeze(1)
    assert_close(out[-1].double(), truth, rtol=0, atol=1e-4 * truth.abs().max().item())
    assert gradient_is_finite(out, x)


def test_a_depthwise_convolution_and_softmax_attention_over_100_000_items():
    x, offsets = long_row(12)
    tail = x.detach()[-50:].double()
    weight, bias = draw(12, 1, 4), draw(12)
    out = ragged_conv1d(x, weight.float(), bias.float(), offsets, True)
    assert_close(out[-1].double(), conv_reference(tail, weight, bias, offsets_of([50]), True)[-1], rtol=1e-5, atol=1e-5)
    assert gradient_is_finite(out, x)
    out = softmax_attention(x, offsets, 2, 50)  # in windows of 50 items
    assert_close(out[-50:].double(), softmax_reference(tail, offsets_of([50]), 2, 50), rtol=1e-5, atol=1e-5)
    assert gradient_is_finite(out, x)


def bf16_cases():
    """Each op beside its naive code, and inputs."""
    torch.manual_seed(0)
    lengths = [0, 2, 0, 65, 1, 40, 0]
    offsets, items, sequences = offsets_of(lengths), sum(lengths), len(lengths)
    q, k, v, q_rotary, k_rotary = (draw(items, 4, 8) for _ in range(5))
    decay = torch.polar(torch.linspace(0.8, 0.99, 8, dtype=torch.float64), torch.linspace(0, 6, 8, dtype=torch.float64))
    scan_inputs = [draw(items, 2, 8), torch.stack([decay.real, decay.imag]), draw(sequences, 2, 8)]
    ids = torch.arange(items) % 5, torch.arange(30) % 20

    def sums(op):
        return lambda x, weight, initial: op(x, weight, offsets, initial)

    def sampled(query, positive, negatives):
        log_q = torch.linspace(-2, 1, 30)
        return sampled_softmax(query, positive, negatives, *ids, log_q, 0.5).to(query.dtype)

    def sampled_reference(query, positive, negatives):
        scores = query @ negatives.t() / 0.5 - torch.linspace(-2, 1, 30, dtype=query.dtype)
        scores = scores.masked_fill(ids[0].unsqueeze(1) == ids[1], -torch.inf)
        positive_score = (query * positive).sum(1, keepdim=True) / 0.5
        return torch.cat([positive_score, scores], 1).exp().sum(1).log() - positive_score.squeeze(1)

    cases = {
        "gru": (sums(ragged_gru), sums(gru_reference), gru_inputs(lengths, 32)),
        "scan": (sums(diagonal_scan), sums(scan_reference), scan_inputs),
        "continued attention": (
            lambda q, k, v, initial: continue_attention(q, k, v, offsets, initial),
            lambda q, k, v, initial: continue_reference(q, k, v, offsets, initial),
            [q, k, v, draw(sequences, 4, 8, 8)],
        ),
        "softmax attention": (
            lambda x: softmax_attention(x, offsets, 4, 50),
            lambda x: softmax_reference(x, offsets, 4, 50),
            [draw(items, 96)],
        ),
        "sampled softmax": (sampled, sampled_reference, [draw(items, 8), draw(items, 8), draw(30, 8)]),
    }
    for causal in (True, False):
        reach = "causal" if causal else "bidirectional"
        x, weight, bias = conv_inputs(lengths, 32, 3)
        for name, kernel in (("conv", weight), ("depthwise conv", weight[:, :1].contiguous())):
            cases[f"{name}, {reach}"] = (
                lambda x, w, b, causal=causal: ragged_conv1d(x, w, b, offsets, causal),
                lambda x, w, b, causal=causal: conv_reference(x, w, b, offsets, causal),
                [x, kernel, bias],
            )
        cases[f"attention, {reach}"] = (
            lambda q, k, v, causal=causal: linear_attention(q, k, v, offsets, causal),
            lambda q, k, v, causal=causal: attention_reference(q, k, v, offsets, causal),
            [q, k, v],
        )
        cases[f"normalized attention, {reach}"] = (
            lambda *x, causal=causal: normalized_attention(*x, offsets, causal, 1e-3),
            lambda *x, causal=causal: normalized_attention_reference(*x, offsets, causal, 1e-3),
            [q.abs() + 0.1, k.abs() + 0.1, q_rotary, k_rotary, v],
        )
    return cases


@pytest.mark.parametrize("name", bf16_cases())
def test_bf16_is_about_as_near_the_truth_as_naive_code(name):
    """At most 2x (results) and 5x (gradients) as far as naive code in bf16, and a rounding."""
    fast, reference, inputs = bf16_cases()[name]
    inputs = [x.bfloat16().double() for x in inputs]
    truth = run(reference, inputs, torch.float64)
    found, naive = run(fast, inputs, torch.bfloat16), run(reference, inputs, torch.bfloat16)
    for part, factor in ((0, 2), (1, 5)):
        for y, y_naive, y_truth in zip(found[part], naive[part], truth[part], strict=True):
            assert y.dtype == torch.bfloat16
            assert error(y, y_truth) <= factor * error(y_naive, y_truth) + 2.0**-8
