"""Time-major order of a ragged batch: all first items, then all second items, and so on.

Sequences are ranked by length, longest first, so the sequences still alive at a time step are always a prefix of the
ranking and a recurrence runs over plain slices, with no padding and no mask::

    sequence  a0 a1 a2 | b0 | c0 c1        time-major  a0 c0 b0 | a1 c1 | a2
                                           alive       3          2       1
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, sequence_index


class TimeMajor(NamedTuple):
    """The map between a ragged batch and its time-major order."""

    rows: Tensor
    """Row of the ragged batch at each time-major place, int64 ``[T]``."""
    places: Tensor
    """Time-major place of each row of the ragged batch, int64 ``[T]``: the inverse of ``rows``."""
    alive: list[int]
    """Number of sequences alive at each time step."""
    ranking: Tensor
    """Sequences from the longest to the shortest, int64 ``[B]``."""


def time_major(offsets: Tensor, num_items: int) -> TimeMajor:
    """Rank the sequences of a ragged batch and lay its items out by time step.

    Outside TorchScript the latest layouts are kept: every block of an encoder asks for the same one, forward and backward.
    They are not to be changed.
    """
    if torch.jit.is_scripting():
        return _time_major(offsets, num_items)
    return _kept(tuple(offsets.tolist()), offsets.device)


@lru_cache(maxsize=4)
def _kept(offsets: tuple[int, ...], device: torch.device) -> TimeMajor:
    """The layout, by the values of the offsets."""
    return _time_major(torch.tensor(offsets, device=device), offsets[-1])


def _time_major(offsets: Tensor, num_items: int) -> TimeMajor:
    lengths = lengths_from_offsets(offsets)
    ranking = torch.sort(lengths, descending=True, stable=True)[1]
    num_steps = 0
    if lengths.numel() > 0:
        num_steps = int(lengths.max().item())
    # alive[t] = number of sequences longer than t, from the histogram of lengths.
    ended = torch.bincount(lengths, minlength=num_steps + 1).cumsum(0)
    alive = (lengths.numel() - ended)[:num_steps]
    first_place = alive.cumsum(0) - alive
    rank = torch.empty_like(ranking)
    rank[ranking] = torch.arange(ranking.numel(), device=ranking.device)
    index = sequence_index(offsets, num_items)
    position = torch.arange(num_items, device=offsets.device) - offsets[:-1][index]
    places = first_place[position] + rank[index]
    rows = torch.empty_like(places)
    rows[places] = torch.arange(num_items, device=places.device)
    alive_list: list[int] = alive.tolist()
    return TimeMajor(rows, places, alive_list, ranking)
