"""Learning rates over a run."""

import math

from torchrec.optim.keyed import CombinedOptimizer


class LearningRates:
    """Raise all learning rates of an optimizer, then lower them.

    Args:
        optimizer: with the highest rates in its groups; a fused table reads its own at the next ``zero_grad``.
        schedule: see `learning_rate_scale`.
        warmup_steps: likewise.
    """

    def __init__(self, optimizer: CombinedOptimizer, schedule: str, warmup_steps: int):
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.highest = [group["lr"] for group in optimizer.param_groups]

    def set(self, done: float, step: int) -> None:
        """Set the rates of a step: ``done`` and ``step`` as for `learning_rate_scale`."""
        scale = learning_rate_scale(self.schedule, done, step, self.warmup_steps)
        for group, highest in zip(self.optimizer.param_groups, self.highest):
            group["lr"] = highest * scale


def learning_rate_scale(schedule: str, done: float, step: int, warmup_steps: int) -> float:
    """Give the factor of all learning rates: a linear rise over the first steps, times the schedule.

    Args:
        schedule: ``constant``, ``linear`` or ``cosine``.
        done: share of the training that lies behind, from 0 to 1.
        step: steps that lie behind.
        warmup_steps: 0 for none.
    """
    rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rising * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
