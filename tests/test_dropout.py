"""The dropout of the encoders: its law, its gradient, its randomness."""

import pytest
import torch

from glintru_rec.ops.dropout import Dropout


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (7, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_scaled_or_zeroes(shape, dtype):
    dropout = Dropout(0.25)
    x = torch.ones(shape, dtype=dtype)
    out = dropout(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    kept = torch.tensor(65536 / 49152, dtype=dtype)
    assert bool(((out == 0) | (out == kept)).all())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_expectation(rate):
    """Within five standard deviations of 10^6 independent draws; neighbours are independent."""
    torch.manual_seed(0)
    dropped = (Dropout(rate)(torch.ones(1_000_000, dtype=torch.float64)) == 0).double()
    deviation = (rate * (1 - rate) / 1e6) ** 0.5
    assert abs(dropped.mean() - rate) < 5 * deviation + 2**-16
    for distance in (1, 2, 3, 4):  # four elements share one draw of 64 bits
        both = (dropped[:-distance] * dropped[distance:]).mean()
        assert abs(both - rate * rate) < 10 * deviation + 2**-15


def test_highest_rates():
    """Rounded to 2^-16 they still keep something, scaled by what they keep."""
    out = Dropout(0.999999)(torch.ones(1_000_000))
    assert set(out.unique().tolist()) <= {0.0, 65536.0}


def test_gradient_is_the_mask():
    x = torch.randn(50, 3, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)


def test_follows_the_seed():
    x, dropout = torch.ones(1000), Dropout(0.5)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_identity_when_evaluating_and_scripted():
    x = torch.randn(5, 4)
    dropout = Dropout(0.5).eval()
    assert torch.equal(dropout(x), x)
    assert torch.equal(torch.jit.script(dropout)(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
