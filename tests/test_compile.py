"""Operators under torch.library's own checks, and encoders compiled whole: no graph break, one graph for all shapes."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from glintru_rec.encoders import ENCODERS
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import sampled_softmax
from glintru_rec.ops.diagonal_scan import diagonal_scan
from glintru_rec.ops.dropout import Dropout
from glintru_rec.ops.gru import ragged_gru
from glintru_rec.ops.linear_attention import linear_attention
from glintru_rec.ops.normalized_attention import normalized_attention
from glintru_rec.ops.rotary import rotate, rotate_reference
from glintru_rec.ops.softmax_attention import softmax_attention, softmax_reference

BATCHES = [[3, 0, 17, 1], [0, 0], [], [33]]


def offsets_of(lengths):
    return offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def operator_inputs(lengths, dtype=torch.float64):
    """Arguments of every registered operator with a gradient and torch code, by its name."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    torch.manual_seed(0)
    items, sequences, offsets = sum(lengths), len(lengths), offsets_of(lengths)
    q, k, v, state = draw(items, 2, 3), draw(items, 2, 3), draw(items, 2, 5), draw(sequences, 2, 3, 5)
    rotary = draw(items, 2, 3), draw(items, 2, 3)
    weights = q.detach().exp().requires_grad_(), k.detach().exp().requires_grad_()
    seed = torch.tensor([7])
    inputs = {
        "gru_forward": (draw(items, 12), draw(12, 4), draw(sequences, 4), offsets, True, "auto"),
        "scan_forward": (draw(items, 2, 3), draw(2, 3), draw(sequences, 2, 3), offsets, "auto"),
        "attention_forward": (q, k, v, state, offsets, True, 4, "auto"),
        # Scores against five negatives, of which every third target is one.
        "negatives_forward": (
            *(draw(items, 4), draw(5, 4), torch.rand(5, dtype=dtype)),
            *(torch.arange(items) % 3, torch.tensor([0, 7, 7, 8, 9]), torch.arange(items) * 5 + 1, -1.0, True, "auto"),
        ),
        "rotate": (draw(items, 2, 6), torch.rand(items, 3), torch.rand(items, 3)),
        "softmax_attention": (draw(items, 12), offsets, seed, 2, 5, 0.3),
    }
    for causal in (True, False):
        for name, channels in (("dense", 4), ("depthwise", 1)):
            conv = draw(items, 4), draw(4, channels, 3), draw(4), offsets, causal, "auto"
            inputs[f"conv_forward, {name}, causal {causal}"] = conv
        key_sums = draw(sequences, 2, 3).detach().exp().requires_grad_()
        options = (state, key_sums, offsets, causal, 0.1, 4, "auto")
        inputs[f"normalized_forward, causal {causal}"] = (*weights, *rotary, v, *options)
    return inputs


@pytest.mark.parametrize(
    ("lengths", "dtype"), [*((lengths, torch.float64) for lengths in BATCHES), (BATCHES[0], torch.bfloat16)]
)
def test_operators_are_registered_right(lengths, dtype):
    """Schema, fake results against real ones, autograd registration."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for name, arguments in operator_inputs(lengths, dtype).items():
        torch.library.opcheck(getattr(torch.ops.glintru_rec, name.split(",")[0]).default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.glintru_rec.random_bits.default, (torch.empty(0), [3, 5]), test_utils=checks[:2])


@pytest.mark.parametrize("name", operator_inputs([1]))
def test_gradients_of_operators(name):
    """All results count, the final states too; dynamic shapes trace forward and backward."""
    operator, arguments = getattr(torch.ops.glintru_rec, name.split(",")[0]), operator_inputs([2, 0, 5])[name]

    def differentiable(*leaves):
        results = operator(*leaves, *arguments[len(leaves) :])
        results = results if isinstance(results, tuple) else (results,)
        return tuple(result for result in results if result.requires_grad)

    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    assert torch.autograd.gradcheck(differentiable, leaves)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_aot_dispatch_dynamic",))


@pytest.mark.parametrize("channels", [4, 1])
def test_gradients_of_convolutions_lie_in_memory_as_a_compiler_is_told(channels):
    """An encoder whose compiled backward pass finds them elsewhere does not train."""
    grad, x, weight, offsets = torch.randn(7, 4), torch.randn(7, 4), torch.randn(4, channels, 3), offsets_of([2, 0, 5])
    arguments = (grad, x, weight, offsets, True, "auto")
    gradients = torch.ops.glintru_rec.conv_backward(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        promised = torch.ops.glintru_rec.conv_backward(*arguments)
    assert [x.stride() for x in gradients] == [x.stride() for x in promised]


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_an_implementation_that_is_not_there(implementation):
    q, offsets = torch.ones(2, 1, 4), torch.tensor([0, 2])
    calls = [
        lambda: ragged_gru(torch.ones(2, 12), torch.ones(12, 4), offsets, implementation=implementation),
        lambda: diagonal_scan(torch.ones(2, 2, 4), torch.ones(2, 4), offsets, implementation=implementation),
        lambda: linear_attention(q, q, q, offsets, True, implementation=implementation),
        lambda: normalized_attention(q, q, q, q, q, offsets, True, 1.0, implementation=implementation),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"implementation is '{implementation}'"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotate_equals_real_arithmetic(dtype):
    torch.manual_seed(0)
    x, angle = torch.randn(7, 2, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    turned = rotate(x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype))
    assert turned.dtype == dtype
    assert_close(turned.double(), rotate_reference(x, angle.cos(), angle.sin()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [*BATCHES, [9, 40, 8]])
def test_softmax_attention_equals_truth(lengths):
    qkv, offsets = torch.randn(sum(lengths), 12, dtype=torch.float64, requires_grad=True), offsets_of(lengths)
    found, expected = softmax_attention(qkv, offsets, 2, 9), softmax_reference(qkv, offsets, 2, 9)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    found, expected = (torch.autograd.grad((out * weight).sum(), qkv)[0] for out in (found, expected))
    assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_softmax_attention_drops_weights():
    """The mean over many draws is the undropped result, and one draw is another."""
    torch.manual_seed(0)
    qkv, offsets = torch.randn(6, 12), torch.tensor([0, 6])
    draws = torch.stack([softmax_attention(qkv, offsets, 2, 6, 0.25) for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    deviation = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - softmax_attention(qkv, offsets, 2, 6)).abs() <= 5 * deviation + 1e-6).all())


OPTIONS = {
    "glint_ru": {},
    "rec_grela": {"num_blocks": 1},
    "lru_rec": {"num_blocks": 1},
    "sasrec": {"num_blocks": 1, "max_seq_len": 12},
}
SHAPES = [[5, 3, 9], [7, 2, 20, 0, 4], [1, 1], [40]]


def ragged(lengths, width=8):
    offsets = offsets_of(lengths)
    return torch.randn(sum(lengths), width).requires_grad_(), offsets


def eager_and_compiled(name, call):
    """Run ``call`` of an encoder on every shape, eager and compiled, with the same draws of dropout."""
    torch.manual_seed(0)
    encoder = ENCODERS[name](8, num_heads=2, **OPTIONS[name]) if name != "lru_rec" else ENCODERS[name](8, **OPTIONS[name])
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda *x: call(encoder, *x), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in SHAPES:
        x, offsets = ragged(lengths)
        results = []
        for function in (lambda *x: call(encoder, *x), compiled):
            torch.manual_seed(1)
            results.append(function(x, offsets))
        yield encoder, x, *results
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] <= 2  # the first, and one more for other shapes


@pytest.mark.parametrize("name", ENCODERS)
def test_training_compiles_whole(name):
    """Forward and backward, with the same dropout as without a compiler."""
    for encoder, x, eager, compiled in eager_and_compiled(name, lambda encoder, x, offsets: encoder(x, offsets)):
        assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
        weight = torch.randn_like(eager)
        leaves = [x, *encoder.parameters()]
        found, expected = (torch.autograd.grad((hidden * weight).sum(), leaves) for hidden in (compiled, eager))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def prefill_and_step(encoder, x, offsets):
    hidden, state = encoder.prefill(x, offsets)
    return hidden, encoder.step(x[: offsets.size(0) - 1], state)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "sasrec"])
def test_recurrent_form_compiles_whole(name):
    with torch.no_grad():
        for _, _, eager, compiled in eager_and_compiled(name, prefill_and_step):
            assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_sampled_softmax_compiles_whole():
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(sampled_softmax, fullgraph=True, dynamic=True, backend="aot_eager")
    for targets, negatives in ((5, 7), (11, 3), (2, 30)):
        query, positive, vectors = torch.randn(targets, 4), torch.randn(targets, 4), torch.randn(negatives, 4)
        target_ids, negative_ids = torch.randint(20, (targets,)), torch.randint(20, (negatives,))
        arguments = (query, positive, vectors, target_ids, negative_ids, torch.randn(negatives), 0.5, positive, None)
        assert_close(compiled(*arguments), sampled_softmax(*arguments))
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_draws_differ():
    """Places with equal shapes get masks of their own, and so does each call."""
    torch._dynamo.reset()
    dropout, other = Dropout(0.5), Dropout(0.5)
    compiled = torch.compile(lambda x: (dropout(x), other(2 * x)), fullgraph=True, backend="aot_eager")
    first, second = compiled(torch.ones(1000))
    assert not torch.equal(first, second / 2)
    assert not torch.equal(first, compiled(torch.ones(1000))[0])
