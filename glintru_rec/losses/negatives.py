"""Negative items shared by a batch, and how often each is expected in the sample.

A sample is drawn from one distribution, holds the batch's own targets, or is the union of both; the samples of all ranks
may be joined. Whatever it is made of, item i is expected in it ``Σ_parts size · p(i)`` times, and the log of that is what
`sampled_softmax` corrects by. Everything here lives on the CPU, takes the same time for a draw whatever V, and keeps no state:
what a resumed run draws follows from the generator, which its trainer seeds for every step.

Shapes: K negatives, N ids, T targets, V catalog.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Weights of a popularity distribution are integers, whose sum has at most this many bits: what is drawn is what `log_p` says,
# to the last bit.
_TOTAL_WEIGHT_BITS = 60


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


def _draw_evenly(num_items: int, num_draws: int, generator: torch.Generator | None) -> Tensor:
    """Draw from ``0 .. num_items-1``: int64 ``[num_draws]``."""
    # `torch.randint` itself takes 32 random bits modulo the size where that is below 2^32: of 200 million ids, it draws the
    # first third 22 times where the others come 21 times.
    return torch.randint(1 << 62, (num_draws,), dtype=torch.int64, generator=generator).remainder_(num_items)


class Uniform:
    """p(i) = 1 / V."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Distribution`."""
        return _draw_evenly(self.num_items, num_draws, generator)

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

    A draw takes the same time for any catalog: it picks one of V places, all alike, and there either the place's own item or
    the one other item that has the rest of the place (Walker's alias method). 24 bytes an item; 8 where nothing is drawn.

    Args:
        counts: of any real type, none negative, not all of them 0, ``[V]``.
        power: 1 for popularity itself, 0 for uniform draws from the items that have a count.
    """

    def __init__(self, counts: Tensor, power: float = 1.0):
        self.num_items = counts.numel()
        self.room = 1 << (_TOTAL_WEIGHT_BITS - self.num_items.bit_length())  # of one place
        total = self.num_items * self.room
        share = (counts.double() / counts.max()).pow_(power)
        share[counts == 0] = 0
        self.weights = share.mul_(total / share.sum()).round_().long()
        self.weights.clamp_(min=(counts > 0).long())  # even the rarest can be drawn
        self.weights[self.weights.argmax()] += total - self.weights.sum()  # rounding; now the places are just filled

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """How much of place i item i has itself, and which item has the rest: int64 ``[V]`` both; made for the first draw."""
        return _alias_table(self.weights, self.room)

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """See `Distribution`."""
        place = _draw_evenly(self.num_items, num_draws, generator)
        inside = torch.randint(self.room, (num_draws,), dtype=torch.int64, generator=generator)
        kept, alias = self.places
        return torch.where(inside < kept[place], place, alias[place])

    def log_p(self, ids: Tensor) -> Tensor:
        """See `Distribution`."""
        return self.weights[ids].double().log() - math.log(self.num_items * self.room)


def _alias_table(weights: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Fill V places of equal room with V items: how much of place i item i has itself, and which item has the rest.

    Items lighter than a place leave a gap in theirs, heavier ones have a surplus. In the order of ids, the gaps are filled from
    the first surplus that is left, each from one item alone; the item that gives more than it has to spare leaves a gap in
    its own place for the next. Running sums of gaps and surpluses say at once who fills which (no loop over items).

    Args:
        weights: int64 ``[V]``, with the sum V * room.
        room: of a place.

    Returns:
        int64 ``[V]`` both; where item i has all of place i, the second is any item.
    """
    kept, alias = weights.clamp(max=room), torch.arange(weights.numel())
    light, heavy = (weights < room).nonzero().squeeze(1), (weights >= room).nonzero().squeeze(1)
    gaps, surplus = (room - weights[light]).cumsum(0), (weights[heavy] - room).cumsum(0)
    begins = gaps - (room - weights[light])
    alias[light] = heavy[torch.searchsorted(surplus, begins, right=True)]
    alias[heavy[:-1]] = heavy[1:]
    if light.numel():
        # The gap in which a heavy item's surplus ends, and what is missing there.
        last = torch.searchsorted(gaps, surplus, right=True).clamp_(max=light.numel() - 1)
        is_within = (begins[last] < surplus) & (surplus < gaps[last])
        kept[heavy] -= torch.where(is_within, gaps[last] - surplus, 0)
    return kept, alias


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
