"""What a user has seen before a target weighs less among its negatives, or nothing.

Rankings leave out what a user has seen. A loss that has it among the negatives teaches the model to score it low, and what is
alike with it. With weight w an item seen counts in the softmax's sum as w · exp(score).

Shapes: T targets, N items of the batch, P pairs of a target and an item that it has seen, K negatives, h items that
a position aims at.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glintru_rec.jagged import offsets_from_lengths, sequence_index


class Seen(NamedTuple):
    """For each target the items of its history, as a slice of the batch's items: nothing of size T x T exists."""

    item_ids: Tensor
    """Of all sequences, int64 ``[N]``."""
    begins: Tensor
    """Where the slice of each target begins, int64 ``[T]``."""
    ends: Tensor
    """Behind its last item, int64 ``[T]``."""
    aims: Tensor
    """Items that the target's position aims at: they keep their weight, for their scores are to rise. int64 ``[T, h]``."""
    log_weight: float
    """log w; minus infinity leaves them out."""

    def pairs(self, targets: slice) -> tuple[Tensor, Tensor]:
        """Give every pair of one of ``targets``, counted from the first of them, and an item it has seen: two int64 ``[P]``."""
        begins, aims = self.begins[targets], self.aims[targets]
        target, place = _expand(begins, self.ends[targets] - begins)
        item_ids = self.item_ids[place]
        counted = (item_ids.unsqueeze(1) != aims[target]).all(1)
        if not counted.all():  # seldom
            target, item_ids = target[counted], item_ids[counted]
        return target, item_ids

    def places(self, negative_ids: Tensor) -> Tensor:
        """Say which of the targets' scores of shared negatives, ``[T, K]`` row by row, are of an item seen: int64 ``[P]``."""
        drawn = torch.isin(self.item_ids, negative_ids)  # few are, of a large catalog
        before = offsets_from_lengths(drawn)
        few = Seen(self.item_ids[drawn], before[self.begins], before[self.ends], self.aims, self.log_weight)
        target, item_ids = few.pairs(slice(None))
        ids, order = negative_ids.sort()  # one may be drawn several times
        first = torch.searchsorted(ids, item_ids)
        pair, place = _expand(first, torch.searchsorted(ids, item_ids, right=True) - first)
        return target[pair] * negative_ids.numel() + order[place]


def seen_before(item_ids: Tensor, offsets: Tensor, places: Tensor, horizon: int, weight: float) -> Seen:
    """Take for seen what stands before each target in its sequence.

    Args:
        item_ids: of all sequences, int64 ``[N]``.
        offsets: int64 ``[B + 1]``.
        places: of the targets among the items, int64 ``[T]``.
        horizon: how many items from the target on its position aims at.
        weight: w, from 0 (left out) to 1 (as any other item).
    """
    sequence = sequence_index(offsets, item_ids.numel())[places]
    last = offsets[1:][sequence] - 1
    ahead = torch.minimum(places.unsqueeze(1) + torch.arange(horizon, device=places.device), last.unsqueeze(1))
    log_weight = math.log(weight) if weight > 0 else -math.inf
    return Seen(item_ids, offsets[:-1][sequence], places, item_ids[ahead], log_weight)


def _expand(begins: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Write out slices ``begin .. begin + count - 1``: of each number in them, the slice it is from, and itself."""
    offsets = offsets_from_lengths(counts)
    index = sequence_index(offsets, int(offsets[-1]))
    return index, torch.arange(index.numel(), device=begins.device) + (begins - offsets[:-1])[index]
