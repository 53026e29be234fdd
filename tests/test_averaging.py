"""The average of weights, and the schedule of learning rates."""

import pytest
import torch
from torch import nn

from glintru_rec.training.averaging import WeightAverage
from glintru_rec.training.schedule import learning_rate_scale


def test_average_is_the_recursion():
    """w̄ ← d w̄ + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), in float64."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    average = WeightAverage([parameter], decay=0.5)
    expected = parameter.detach().clone()
    for n in range(40):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        average.update(n)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * parameter.detach()
        torch.testing.assert_close(average.average[0], expected)


def test_average_goes_in_and_out():
    parameter = nn.Parameter(torch.zeros(4))
    average = WeightAverage([parameter], decay=0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(0)
    before = average.average[0].clone()
    with average.in_place() as weights:
        assert torch.equal(parameter, before)
        assert torch.equal(weights[0], torch.ones(4))
    assert torch.equal(parameter, torch.ones(4))
    assert torch.equal(average.average[0], before)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.75, 0]), ("cosine", [1, 0.8535533905932737, 0])]
)
def test_schedules(schedule, expected):
    assert [learning_rate_scale(schedule, done, 100, 0) for done in (0, 0.25, 1)] == pytest.approx(expected, abs=1e-12)


def test_warmup_rises_from_the_first_step():
    scales = [learning_rate_scale("linear", step / 10, step, 4) for step in range(6)]
    assert scales == pytest.approx([0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5])
