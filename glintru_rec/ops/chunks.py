"""Ragged batches in chunks of C items, each sequence starting one of its own, for attention without a softmax.

Chunks lie in time-major order: all first chunks, then all second chunks, and so on, sequences with most chunks first. So a
sum that runs along the sequences is one addition of plain slices for each chunk number::

    sequence  a0 a1 a2 a3 a4 | b0 | c0 c1 c2        C = 2        chunks  a0 a1 | c0 c1 | b0 - || a2 a3 | c2 - || a4 -
                                                                 alive   3                     2              1

A cumulative sum over the whole batch would be one call, but would mix the rounding of one sequence into the next.

Shapes: T items, B sequences, H heads, C items of a chunk, M chunks.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths, positions, sequence_index
from glintru_rec.ops.time_major import time_major


class ChunkLayout(NamedTuple):
    """The map between ``[T, H]`` rows of a ragged batch and ``[M, H, C]`` slots."""

    rows: Tensor
    """Row at each slot, int64 ``[M*H*C]``; past its sequence's end a slot repeats the last item."""
    slots: Tensor
    """Slot of each row, int64 ``[T*H]``."""
    padding: Tensor
    """Slots past a sequence's end, int64."""
    owners: Tensor
    """Sequence of each chunk, int64 ``[M]``."""
    alive: list[int]
    """Number of sequences that have a first chunk, a second one, and so on."""
    filled: Tensor
    """Sequences that have items, int64."""
    ends: Tensor
    """Last chunk of each of them, int64."""


def chunk_layout(offsets: Tensor, num_items: int, num_heads: int, chunk_size: int) -> ChunkLayout:
    """Cut a ragged batch into chunks. Outside TorchScript the latest layouts are kept, as those of `time_major`."""
    if torch.jit.is_scripting():
        return _chunk_layout(offsets, num_items, num_heads, chunk_size)
    return _kept(tuple(offsets.tolist()), offsets.device, num_heads, chunk_size)


@lru_cache(maxsize=4)
def _kept(offsets: tuple[int, ...], device: torch.device, num_heads: int, chunk_size: int) -> ChunkLayout:
    return _chunk_layout(torch.tensor(offsets, device=device), offsets[-1], num_heads, chunk_size)


def _chunk_layout(offsets: Tensor, num_items: int, num_heads: int, chunk_size: int) -> ChunkLayout:
    chunk_offsets = offsets_from_lengths((lengths_from_offsets(offsets) + (chunk_size - 1)) // chunk_size)
    num_chunks = int(chunk_offsets[-1].item())
    order = time_major(chunk_offsets, num_chunks)
    owners = sequence_index(chunk_offsets, num_chunks)[order.rows]
    within = torch.arange(chunk_size, device=offsets.device)
    heads = torch.arange(num_heads, device=offsets.device)
    first = offsets[:-1][owners] + (order.rows - chunk_offsets[:-1][owners]) * chunk_size
    items = first.unsqueeze(1) + within  # [M, C]
    ends = offsets[1:][owners].unsqueeze(1)
    rows = torch.minimum(items, ends - 1).unsqueeze(1) * num_heads + heads.unsqueeze(1)
    padding = (items >= ends).unsqueeze(1).expand(-1, num_heads, -1).reshape(-1).nonzero().squeeze(1)
    index, position = sequence_index(offsets, num_items), positions(offsets, num_items)
    chunk = order.places[chunk_offsets[:-1][index] + position // chunk_size]
    slots = (chunk.unsqueeze(1) * num_heads + heads) * chunk_size + (position % chunk_size).unsqueeze(1)
    filled = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
    last = order.places[chunk_offsets[1:][filled] - 1]
    return ChunkLayout(rows.reshape(-1), slots.reshape(-1), padding, owners, order.alive, filled, last)


def to_chunks(x: Tensor, layout: ChunkLayout, chunk_size: int, padded: bool) -> Tensor:
    """Bring ``[T, H, d]`` to ``[M*H, C, d]``; padding holds zeros, or what must not matter if not ``padded``."""
    chunks = x.reshape(-1, x.size(2)).index_select(0, layout.rows)
    if padded and layout.padding.numel() > 0:
        chunks.index_fill_(0, layout.padding, 0.0)
    return chunks.view(-1, chunk_size, x.size(2))


def from_chunks(chunks: Tensor, layout: ChunkLayout, num_heads: int) -> Tensor:
    """Bring ``[M*H, C, d]`` back to ``[T, H, d]``."""
    return chunks.reshape(-1, chunks.size(2)).index_select(0, layout.slots).view(-1, num_heads, chunks.size(2))


def sums_before(sums: Tensor, initial: Tensor, layout: ChunkLayout) -> Tensor:
    """Add to each sequence's initial sum those of its earlier chunks.

    Args:
        sums: of each chunk alone, ``[M, ...]``.
        initial: of each sequence, ``[B, ...]``.
        layout: of the chunks.

    Returns:
        For every chunk, the sum of what comes before it, ``[M, ...]``.
    """
    before = torch.empty_like(sums)
    start = 0
    for number, n in enumerate(layout.alive):
        if number == 0:
            before[:n] = initial.index_select(0, layout.owners[:n])
        else:
            previous = layout.alive[number - 1]
            here = start + previous
            torch.add(before[start : start + n], sums[start : start + n], out=before[here : here + n])
            start = here
    return before


def sums_after(sums: Tensor, final: Tensor, layout: ChunkLayout) -> Tensor:
    """Add to what comes after each sequence the sums of its later chunks: `sums_before`, from the end."""
    after = final.index_select(0, layout.owners)  # right for each sequence's last chunk
    end = after.size(0)
    for number in range(len(layout.alive) - 1, 0, -1):
        n, previous = layout.alive[number], layout.alive[number - 1]
        here, start = end - n, end - n - previous
        torch.add(after[here:end], sums[here:end], out=after[start : start + n])
        end = here
    return after


def total_sums(sums: Tensor, before: Tensor, initial: Tensor, layout: ChunkLayout) -> Tensor:
    """Add up a sequence's initial sum and all its chunks: ``[B, ...]``, from what `sums_before` gave."""
    ends = layout.ends
    return initial.index_copy(0, layout.filled, before.index_select(0, ends) + sums.index_select(0, ends))
