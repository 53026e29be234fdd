"""Negative items shared by a batch, and how often each is expected in the sample.

A sample is drawn from one distribution, holds the batch's own targets, or is the union of both; the samples of all ranks
may be joined. Whatever it is made of, item i is expected in it ``Σ_parts size · p(i)`` times, and the log of that is what
`sampled_softmax` corrects by. Everything here lives on the CPU.

Shapes: K negatives, N ids, T targets, V catalog.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Weights of a popularity distribution are integers that sum to about this: no draw falls between two floats, and what
# `torch.randint` favours by taking random 64 bits modulo the sum stays below 2^-15 of a probability.
_TOTAL_WEIGHT = 1 << 48


class Negatives(NamedTuple):
    """A sample of the catalog."""

    ids: Tensor
    """int64 ``[K]``, repeats included."""
    log_q: Tensor
    """Log of how often each of them is expected in the sample, float32 ``[K]``."""
    target_log_q: Tensor
    """And of each of the batch's targets, float32 ``[T]``; -inf for one that cannot be drawn."""


class Distribution(Protocol):
    """A distribution over the catalog, ids ``0 .. V-1``."""

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw with replacement, from the global source of randomness without a generator: int64 ``[num_draws]``."""
        ...

    def log_p(self, ids: Tensor) -> Tensor:
        """Log of each item's probability in one draw, float64 ``[N]``; -inf where it is never drawn."""
        ...


class Uniform:
    """p(i) = 1 / V."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Distribution`."""
        return torch.randint(self.num_items, (num_draws,), dtype=torch.int64, generator=generator)

    def log_p(self, ids: Tensor) -> Tensor:
        """See `Distribution`."""
        return torch.full(ids.shape, -math.log(self.num_items), dtype=torch.float64)


class LogUniform:
    """p(i) = log((i + 2) / (i + 1)) / log(V + 1): Zipf's law, where ids are ordered by falling frequency."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Distribution`."""
        # P(id < i) = log(i + 1) / log(V + 1), inverted. Float64 tells neighbouring ids apart up to V = 10^12 and beyond.
        uniform = torch.rand(num_draws, dtype=torch.float64, generator=generator)
        ids = (uniform * math.log(self.num_items + 1)).exp().long() - 1
        return ids.clamp(0, self.num_items - 1)  # rounding

    def log_p(self, ids: Tensor) -> Tensor:
        """See `Distribution`."""
        return (1 / (ids.double() + 1)).log1p().log() - math.log(math.log(self.num_items + 1))


class Popularity:
    """p(i) = count_i^power / Σ_v count_v^power; an item with count 0 is never drawn, whatever the power.

    A draw is a binary search in the running sum of the weights: 8 bytes an item and a build of a few passes, where an alias
    table would take 16 and save a fraction of a microsecond a draw.

    Args:
        counts: of any real type, none negative, not all of them 0, ``[V]``.
        power: 1 for popularity itself, 0 for uniform draws from the items that have a count.
    """

    def __init__(self, counts: Tensor, power: float = 1.0):
        share = (counts.double() / counts.max()).pow_(power)
        share[counts == 0] = 0
        weights = share.mul_(_TOTAL_WEIGHT / share.sum()).round_().long()
        weights.clamp_(min=(counts > 0).long())  # even the rarest can be drawn
        self.cumulative = torch.zeros(counts.numel() + 1, dtype=torch.int64)  # item i has what lies between i and i + 1
        torch.cumsum(weights, 0, out=self.cumulative[1:])

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Distribution`."""
        place = torch.randint(int(self.cumulative[-1]), (num_draws,), dtype=torch.int64, generator=generator)
        return torch.searchsorted(self.cumulative, place, right=True) - 1

    def log_p(self, ids: Tensor) -> Tensor:
        """See `Distribution`."""
        weights = self.cumulative[ids + 1] - self.cumulative[ids]
        return weights.double().log() - math.log(int(self.cumulative[-1]))


class NegativeSampler:
    """Draw the negatives of a batch from a distribution, from the batch's targets, or from both.

    Args:
        drawn: the distribution; None: no draws.
        num_draws: draws from it.
        targets: p(i) = item i's share of all training targets; None: the batch's targets are no negatives.
        max_targets: most of them that are taken, by chance; None: all.
        join: gives the ids of all ranks for this rank's, ranks one after the other; None: this rank's alone.
    """

    def __init__(
        self,
        drawn: Distribution | None = None,
        num_draws: int = 0,
        targets: Distribution | None = None,
        max_targets: int | None = None,
        join: Callable[[Tensor], Tensor] | None = None,
    ):
        self.drawn, self.num_draws = drawn, num_draws
        self.targets, self.max_targets = targets, max_targets
        self.join = join

    def draw(self, target_ids: Tensor) -> Negatives:
        """Draw from the global source of randomness.

        Args:
            target_ids: of the batch, int64 ``[T]``.
        """
        parts: list[tuple[Distribution, Tensor]] = []
        if self.drawn is not None:
            parts.append((self.drawn, self.drawn.draw(self.num_draws)))
        if self.targets is not None:
            taken = target_ids
            if self.max_targets is not None and self.max_targets < target_ids.numel():
                taken = target_ids[torch.randperm(target_ids.numel())[: self.max_targets]]
            parts.append((self.targets, taken))
        if self.join is not None:
            parts = [(distribution, self.join(ids)) for distribution, ids in parts]
        ids = torch.cat([ids for _, ids in parts])
        log_sizes = torch.tensor([len(part) for _, part in parts], dtype=torch.float64).log()  # -inf for a batch of none
        asked = torch.cat([ids, target_ids])
        log_counts = [log_size + distribution.log_p(asked) for log_size, (distribution, _) in zip(log_sizes, parts)]
        log_q, target_log_q = torch.stack(log_counts).logsumexp(0).float().split([ids.numel(), target_ids.numel()])
        return Negatives(ids, log_q, target_log_q)
