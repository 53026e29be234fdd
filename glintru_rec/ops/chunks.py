"""Ragged batches in pieces of equal size, for attention without a softmax: short histories whole, long ones in chunks.

A history of at most two chunks whose state nobody asks for is attended to whole, in a block of its own; blocks are padded to a
multiple of half a chunk, and those of one size lie together. It needs no sum that runs along the sequence.

All others are cut into chunks of C items, each sequence starting one of its own. Chunks lie in time-major order: all first
chunks, then all second chunks, and so on, sequences with most chunks first. So a sum that runs along the sequences is one
addition of plain slices for each chunk number::

    sequence  a0 a1 a2 a3 a4 | b0 | c0 c1 c2        C = 2        chunks  a0 a1 | c0 c1 | b0 - || a2 a3 | c2 - || a4 -
                                                                 alive   3                     2              1

A cumulative sum over the whole batch would be one call, but would mix the rounding of one sequence into the next.

Shapes: T items, B sequences, H heads, C items of a chunk, M chunks, L items of a block, S slots: blocks first, then chunks.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths, sequence_index
from glintru_rec.ops.time_major import time_major


class Block(NamedTuple):
    """Short histories of about the same length, one after another, each with all of its heads."""

    start: int
    """First slot."""
    end: int
    """Slot after the last."""
    length: int
    """Slots L of a history and head."""


class ChunkLayout(NamedTuple):
    """The map between ``[T, H]`` rows of a ragged batch and S slots: ``[*, H, L]`` of each block, then ``[M, H, C]``."""

    rows: Tensor
    """Row at each slot, int64 ``[S]``; past its sequence's end a slot repeats the last item."""
    slots: Tensor
    """Slot of each row, int64 ``[T*H]``."""
    padding: Tensor
    """Slots past a sequence's end, int64."""
    blocks: list[Block]
    """Histories that are attended to whole."""
    first: int
    """First slot of the chunks."""
    chunk_size: int
    num_sequences: int
    """Sequences that are in chunks, whether they have items or not."""
    owners: Tensor
    """Which of these each chunk is part of, int64 ``[M]``."""
    alive: list[int]
    """Number of sequences that have a first chunk, a second one, and so on."""
    filled: Tensor
    """Sequences in chunks that have items, int64."""
    ends: Tensor
    """Last chunk of each of them, int64."""


def chunk_layout(offsets: Tensor, num_items: int, num_heads: int, chunk_size: int, stateful: bool) -> ChunkLayout:
    """Cut a ragged batch into pieces, all sequences into chunks if ``stateful``.

    Outside TorchScript the latest layouts are kept, as those of `time_major`.
    """
    if torch.jit.is_scripting():
        return _chunk_layout(offsets, num_items, num_heads, chunk_size, stateful)
    return _kept(tuple(offsets.tolist()), offsets.device, num_heads, chunk_size, stateful)


@lru_cache(maxsize=4)
def _kept(offsets: tuple[int, ...], device: torch.device, num_heads: int, chunk_size: int, stateful: bool) -> ChunkLayout:
    return _chunk_layout(torch.tensor(offsets, device=device), offsets[-1], num_heads, chunk_size, stateful)


def _chunk_layout(offsets: Tensor, num_items: int, num_heads: int, chunk_size: int, stateful: bool) -> ChunkLayout:
    lengths = lengths_from_offsets(offsets)
    rows: list[Tensor] = []
    padded: list[Tensor] = []
    blocks: list[Block] = []
    first, longest = 0, 0 if stateful else 2 * chunk_size
    step = max(1, chunk_size // 2)
    for length in range(step, longest + 1, step):
        chosen = ((lengths > length - step) & (lengths <= length)).nonzero().squeeze(1)
        if chosen.numel() > 0:
            of_block = _slots(offsets[chosen], offsets[chosen + 1], length, num_heads)
            rows.append(of_block[0])
            padded.append(of_block[1])
            blocks.append(Block(first, first + of_block[0].numel(), length))
            first += of_block[0].numel()
    long = torch.arange(lengths.numel(), device=offsets.device)
    if not stateful:
        long = long[lengths > longest]
    chunk_offsets = offsets_from_lengths((lengths[long] + (chunk_size - 1)) // chunk_size)
    num_chunks = int(chunk_offsets[-1].item())
    order = time_major(chunk_offsets, num_chunks)
    owners = sequence_index(chunk_offsets, num_chunks)[order.rows]
    starts = offsets[long[owners]] + (order.rows - chunk_offsets[owners]) * chunk_size
    of_chunks = _slots(starts, offsets[long[owners] + 1], chunk_size, num_heads)
    rows.append(of_chunks[0])
    padded.append(of_chunks[1])
    row, padding = torch.cat(rows), torch.cat(padded)
    used = padding.logical_not().nonzero().squeeze(1)
    slots = torch.empty_like(row[: num_items * num_heads])
    slots[row[used]] = used
    filled = (lengths[long] > 0).nonzero().squeeze(1)
    ends = order.places[chunk_offsets[1:][filled] - 1]
    padding = padding.nonzero().squeeze(1)
    return ChunkLayout(row, slots, padding, blocks, first, chunk_size, long.numel(), owners, order.alive, filled, ends)


def _slots(starts: Tensor, ends: Tensor, length: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Lay pieces out, from item ``starts`` on, that end before ``ends``: rows, and which are padding, ``[* x H x length]``."""
    items = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
    heads = torch.arange(num_heads, device=starts.device).unsqueeze(1)
    rows = torch.minimum(items, ends.unsqueeze(1) - 1).unsqueeze(1) * num_heads + heads
    padding = (items >= ends.unsqueeze(1)).unsqueeze(1).expand(-1, num_heads, -1)
    return rows.reshape(-1), padding.reshape(-1)


def to_chunks(x: Tensor, layout: ChunkLayout, padded: bool) -> Tensor:
    """Bring ``[T, H, d]`` to slots, ``[S, d]``; padding holds zeros, or what must not matter if not ``padded``."""
    chunks = x.reshape(-1, x.size(2)).index_select(0, layout.rows)
    if padded and layout.padding.numel() > 0:
        chunks.index_fill_(0, layout.padding, 0.0)
    return chunks


def from_chunks(chunks: Tensor, layout: ChunkLayout, num_heads: int) -> Tensor:
    """Bring ``[S, d]`` back to ``[T, H, d]``."""
    return chunks.index_select(0, layout.slots).view(-1, num_heads, chunks.size(1))


def in_block(x: Tensor, block: Block) -> Tensor:
    """View a block's part of ``[S, d]`` as ``[*, L, d]``."""
    return x[block.start : block.end].view(-1, block.length, x.size(1))


def in_chunks(x: Tensor, layout: ChunkLayout) -> Tensor:
    """View the chunks' part of ``[S, d]`` as ``[M*H, C, d]``."""
    return x[layout.first :].view(-1, layout.chunk_size, x.size(1))


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
            before[here : here + n] = before[start : start + n] + sums[start : start + n]
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


def all_states(states: Tensor, num_sequences: int) -> Tensor:
    """Give each sequence its state, or the gradient of it, ``[num_sequences, ...]``: zeros if none is kept, ``[0, ...]``."""
    if states.size(0) == num_sequences:
        return states
    shape = list(states.shape)
    shape[0] = num_sequences
    return torch.zeros(shape, dtype=states.dtype, device=states.device)


def total_sums(sums: Tensor, before: Tensor, initial: Tensor, layout: ChunkLayout) -> Tensor:
    """Add up a sequence's initial sum and all its chunks: ``[B, ...]``, from what `sums_before` gave."""
    ends = layout.ends
    return initial.index_copy(0, layout.filled, before.index_select(0, ends) + sums.index_select(0, ends))
