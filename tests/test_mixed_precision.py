"""Encoders and training under torch.autocast: bf16 factors, fp32 states and weights."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from glintru_rec.encoders import ENCODERS, build_encoder
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.ops.conv import ragged_conv1d
from glintru_rec.ops.diagonal_scan import diagonal_scan
from glintru_rec.ops.gru import ragged_gru
from glintru_rec.ops.linear_attention import linear_attention
from glintru_rec.ops.normalized_attention import normalized_attention
from tests.conftest import SMALL, run_program
from tests.test_training import losses, weights

OFFSETS = offsets_from_lengths(torch.tensor([5, 0, 300, 1, 37]))
T = int(OFFSETS[-1])


def mixed(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


OPERATORS = {
    "gru": (lambda *x: ragged_gru(*x, OFFSETS)[0], [(T, 24), (24, 8)], torch.float32),
    "scan": (lambda x, decay: diagonal_scan(x, decay / 3, OFFSETS)[0], [(T, 2, 5), (2, 5)], torch.float32),
    "attention": (lambda *x: linear_attention(*x, OFFSETS, True), [(T, 2, 4)] * 3, torch.float32),
    "normalized": (
        lambda q, k, *x: normalized_attention(q.abs(), k.abs(), *x, OFFSETS, True, 1e-6),
        [(T, 2, 4)] * 5,
        torch.float32,
    ),
    "conv": (lambda *x: ragged_conv1d(*x, OFFSETS, True), [(T, 8), (8, 8, 3), (8,)], torch.bfloat16),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_cast_what_they_are_given(name):
    """Half of the inputs come in bf16 from a layer before, weights in fp32: as the operator alone on inputs cast."""
    function, shapes, dtype = OPERATORS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    given = [x.bfloat16() if i % 2 == 0 else x for i, x in enumerate(inputs)]
    given, cast = ([x.to(d or x.dtype).requires_grad_() for x in given] for d in (None, dtype))
    with mixed():
        found = function(*given)
    expected = function(*cast)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    weight = torch.randn_like(found)
    grads, expected_grads = (torch.autograd.grad((y * weight).sum(), x) for y, x in ((found, given), (expected, cast)))
    for grad, x, expected_grad in zip(grads, given, expected_grads):
        assert grad.dtype == x.dtype
        assert torch.equal(grad, expected_grad.to(x.dtype))


def without_dropout(name):
    return {"dropout": 0.0, **({"drop_path": 0.0} if name == "rec_grela" else {})}


def encode(encoder, x, offsets=OFFSETS, enabled=True, function=None):
    """Results and gradients of a fixed weighting, all parameters' in one; by ``function``, which is the encoder if absent."""
    with mixed(enabled):
        hidden = (encoder if function is None else function)(x, offsets)
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
    grads = torch.autograd.grad((hidden * weight).sum(), [x, *encoder.parameters()])
    assert all(grad.dtype == x.dtype for grad in grads)
    return hidden.double(), torch.cat([grad.flatten() for grad in grads]).double()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_as_near_the_truth_as_their_factors(name):
    """bf16 rounds a factor by 2^-9 at most; some layers later results are off by a few of that, gradients by more of them."""
    torch.manual_seed(0)
    encoder = build_encoder(name, 32, without_dropout(name))
    x = torch.randn(T, 32)
    bf16 = encode(encoder, x.clone().requires_grad_())
    truth = encode(encoder.double(), x.double().requires_grad_(), enabled=False)
    for found, true, most in zip(bf16, truth, (4 * 2**-9, 16 * 2**-9)):
        assert torch.isfinite(found).all()
        assert 2**-15 < (found - true).norm() / true.norm() < most  # 2^-20 and less in fp32


@pytest.mark.parametrize("name", ENCODERS)
def test_compiled_as_eager(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, 8, {**without_dropout(name), "num_blocks": 1})
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 3, 9], [7, 2, 20, 0, 4]):
        offsets = offsets_from_lengths(torch.tensor(lengths))
        x = torch.randn(sum(lengths), 8, requires_grad=True)
        eager, found = encode(encoder, x, offsets), encode(encoder, x, offsets, function=compiled)
        for ours, theirs in zip(found, eager):
            assert (ours - theirs).norm() < 2**-7 * theirs.norm()
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.programs
def test_training(dataset_dir, tmp_path):
    """On two ranks: losses near those of fp32, and weights in fp32."""
    steps = ["trainer.max_steps=20", "trainer.log_every_steps=1", "model.options.dropout=0"]
    for precision in ("fp32", "bf16"):
        arguments = [f"data.path={dataset_dir}", f"output={tmp_path / precision}", *SMALL, *steps]
        run_program("train", *arguments, f"trainer.precision={precision}", nproc=2)
    found, expected = (np.array([loss for _, loss in losses(tmp_path / precision)]) for precision in ("bf16", "fp32"))
    assert found.size == 20
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert not np.array_equal(found, expected)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "bf16").values())
