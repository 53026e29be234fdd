"""An exponential moving average of the weights, to be validated, saved and used in place of the last weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keep w̄ ← d w̄ + (1 - d) w beside a model's parameters w.

    d rises to ``decay`` as (1 + n) / (10 + n) over the first n updates, so that the average soon forgets the random start.

    Args:
        parameters: of the model, whole on this rank.
        decay: in (0, 1); the average spans about 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [parameter.detach() for parameter in parameters]
        self.average = [parameter.clone() for parameter in self.parameters]
        self.decay = decay

    def update(self, num_updates: int) -> None:
        """Take the present weights in; ``num_updates`` such calls came before."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and their average, in place."""
        for parameter, average in zip(self.parameters, self.average):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    @contextmanager
    def in_place(self) -> Iterator[list[Tensor]]:
        """Put the average into the model for a while; gives the list of weights that training goes on with."""
        self.swap()
        try:
            yield self.average
        finally:
            self.swap()
