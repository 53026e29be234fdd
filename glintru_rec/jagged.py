"""Ragged batches: ``values [T, ...]`` with ``offsets [B + 1]``, no padding.

::

    lengths  [3, 0, 2]
    offsets  [0, 3, 3, 5]
    values   a0 a1 a2 | | c0 c1

Shapes: T items of a batch, B sequences.
"""

import torch
from torch import Tensor


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Turn lengths into offsets.

    Args:
        lengths: number of items of each sequence, int64 ``[B]``.

    Returns:
        int64 ``[B + 1]``, from 0 to T.
    """
    zero = torch.zeros(1, dtype=torch.int64, device=lengths.device)
    return torch.cat([zero, lengths.to(torch.int64).cumsum(0)])


def lengths_from_offsets(offsets: Tensor) -> Tensor:
    """Turn offsets ``[B + 1]`` into lengths ``[B]``."""
    return offsets[1:] - offsets[:-1]


def sequence_index(offsets: Tensor, num_items: int) -> Tensor:
    """Give, for every item of the batch, the sequence it belongs to: int64 ``[T]``."""
    lengths = lengths_from_offsets(offsets)
    rows = torch.arange(lengths.numel(), device=offsets.device)
    return torch.repeat_interleave(rows, lengths, output_size=num_items)


def positions(offsets: Tensor, num_items: int) -> Tensor:
    """Give, for every item of the batch, its position in its own sequence, from 0: int64 ``[T]``."""
    starts = offsets[:-1][sequence_index(offsets, num_items)]
    return torch.arange(num_items, device=offsets.device) - starts


def last_of_each(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Pick the last row of every sequence; an empty sequence gives zeros.

    Args:
        hidden: ``[T, D]``.
        offsets: int64 ``[B + 1]``.

    Returns:
        ``[B, D]``.
    """
    empty = (lengths_from_offsets(offsets) == 0).unsqueeze(1)
    padded = torch.cat([hidden, hidden.new_zeros(1, hidden.size(1))])  # a row to point at when T = 0
    rows = torch.where(empty.squeeze(1), torch.full_like(offsets[1:], hidden.size(0)), offsets[1:] - 1)
    return padded[rows]


def last_items(values: Tensor, offsets: Tensor, count: int) -> Tensor:
    """Give the last ``count`` items of every sequence, zeros before a sequence's first.

    Args:
        values: ``[T, D]``.
        offsets: int64 ``[B + 1]``.
        count: at least 0.

    Returns:
        ``[B, count, D]``, in time order.
    """
    rows = offsets[1:].unsqueeze(1) - count + torch.arange(count, device=offsets.device)
    rows = torch.where(rows >= offsets[:-1].unsqueeze(1), rows, torch.full_like(rows, values.size(0)))
    padded = torch.cat([values, values.new_zeros(1, values.size(1))])  # the row that stands for none
    return padded[rows]


def keep_last(values: Tensor, offsets: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Cut every sequence to its last ``max_length`` items.

    Args:
        values: ``[T, ...]``.
        offsets: int64 ``[B + 1]``.
        max_length: at least 1.

    Returns:
        The remaining values and their offsets.
    """
    lengths = lengths_from_offsets(offsets)
    kept = lengths.clamp(max=max_length)
    index = sequence_index(offsets, values.size(0))
    from_end = offsets[1:][index] - torch.arange(values.size(0), device=offsets.device)
    return values[from_end <= max_length], offsets_from_lengths(kept)
