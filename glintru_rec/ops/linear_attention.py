"""Ragged linear attention: ``a_n = q_nᵀ Σ_m k_m v_mᵀ`` over the items of one sequence.

Causal (``m ≤ n``) works in chunks: within a chunk by a masked ``q kᵀ v``, between chunks by the running sum of
``k vᵀ``, so time and memory grow linearly with the history. Chunks start at each sequence's own first item: a sequence's
result does not depend on what else is in the batch.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values, M chunks of C items.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths, sequence_index
from glintru_rec.ops.rows import gather_rows, scatter_rows
from glintru_rec.ops.time_major import time_major


def attention_reference(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """The truth: one position after another (see `linear_attention`)."""
    out = torch.zeros_like(v)
    for b in range(offsets.numel() - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        for n in range(start, end):
            stop = n + 1 if causal else end
            state = torch.einsum("mhi,mhj->hij", k[start:stop], v[start:stop])
            out[n] = torch.einsum("hi,hij->hj", q[n], state)
    return out


def linear_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, chunk_size: int = 16) -> Tensor:
    """Attend over every sequence of a ragged batch without a softmax.

    Args:
        q: queries, ``[T, H, d]``.
        k: keys, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        offsets: int64 ``[B + 1]``.
        causal: position n attends to items ``1 .. n``; otherwise to all items of its sequence.
        chunk_size: items handled by one masked matmul; changes speed and rounding only.

    Returns:
        ``[T, H, e]``.
    """
    if q.size(0) == 0:
        return v * (q.sum() * k.sum())
    chunks = _pack(q, k, v, offsets, chunk_size)
    if not causal:
        totals = torch.zeros([offsets.numel() - 1, q.size(1), q.size(2), v.size(2)], dtype=q.dtype, device=q.device)
        index = sequence_index(chunks.offsets, chunks.states.size(0))
        totals = totals.index_add(0, index, chunks.states)
        return _unpack(torch.matmul(chunks.q, totals.index_select(0, index)), chunks.slots)
    out = _within(chunks)
    if chunks.states.size(0) > lengths_from_offsets(offsets).count_nonzero():  # a sequence has a second chunk
        out = out + torch.matmul(chunks.q, sums_before(chunks.states, chunks.offsets, None))
    return _unpack(out, chunks.slots)


def continue_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, initial: Tensor | None = None, chunk_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Attend causally (see `linear_attention`) from a state, and give the state that goes on from there.

    Args:
        q: queries, ``[T, H, d]``.
        k: keys, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        offsets: int64 ``[B + 1]``.
        initial: Σ k vᵀ over what came before each sequence, ``[B, H, d, e]``; zeros when absent.
        chunk_size: items handled by one masked matmul; changes speed and rounding only.

    Returns:
        ``[T, H, e]``, and Σ k vᵀ after each sequence's last item, ``[B, H, d, e]`` (an empty sequence gives back its
        initial state).
    """
    if initial is None:
        initial = torch.zeros([offsets.numel() - 1, q.size(1), q.size(2), v.size(2)], dtype=q.dtype, device=q.device)
    if q.size(0) == 0:
        return v * (q.sum() * k.sum()), initial
    chunks = _pack(q, k, v, offsets, chunk_size)
    before = sums_before(chunks.states, chunks.offsets, initial)
    out = _within(chunks) + torch.matmul(chunks.q, before)
    filled = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
    ends = chunks.offsets[1:][filled] - 1
    last = initial.index_copy(0, filled, gather_rows(before, ends) + gather_rows(chunks.states, ends))
    return _unpack(out, chunks.slots), last


class _Chunks(NamedTuple):
    """A ragged batch cut into chunks; slots past a sequence's end hold zeros."""

    q: Tensor
    """``[M, H, C, d]``."""
    k: Tensor
    """``[M, H, C, d]``."""
    v: Tensor
    """``[M, H, C, e]``."""
    states: Tensor
    """Σ k vᵀ of each chunk alone, ``[M, H, d, e]``."""
    offsets: Tensor
    """Where each sequence's chunks start, int64 ``[B + 1]``."""
    slots: Tensor
    """Place of each item among ``M * C``, int64 ``[T]``."""


def _pack(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, chunk_size: int) -> _Chunks:
    """Let every sequence start a chunk of its own."""
    num_items, num_heads, width = q.shape
    chunk_offsets = offsets_from_lengths((lengths_from_offsets(offsets) + (chunk_size - 1)) // chunk_size)
    num_chunks = int(chunk_offsets[-1].item())
    index = sequence_index(offsets, num_items)
    slots = torch.arange(num_items, device=q.device) - offsets[:-1][index] + chunk_offsets[:-1][index] * chunk_size
    packed = scatter_rows(torch.cat([q, k, v], dim=2), slots, num_chunks * chunk_size)
    packed = packed.view(num_chunks, chunk_size, num_heads, packed.size(2)).transpose(1, 2).contiguous()
    q, k, v = packed.split([width, width, v.size(2)], dim=3)
    return _Chunks(q, k, v, torch.matmul(k.transpose(2, 3), v), chunk_offsets, slots)


def _unpack(out: Tensor, slots: Tensor) -> Tensor:
    """Bring ``[M, H, C, e]`` back to the items, ``[T, H, e]``."""
    return gather_rows(out.transpose(1, 2).reshape(out.size(0) * out.size(2), out.size(1), out.size(3)), slots)


def _within(chunks: _Chunks) -> Tensor:
    """Attend causally inside each chunk: ``[M, H, C, e]``."""
    return torch.matmul(torch.matmul(chunks.q, chunks.k.transpose(2, 3)).tril(), chunks.v)


def sums_before(states: Tensor, chunk_offsets: Tensor, initial: Tensor | None) -> Tensor:
    """Sum the states of a sequence's earlier chunks and its initial one, for every chunk: ``[M, H, d, e]``.

    A loop over chunk numbers, vectorised over the sequences that have that many; a cumulative sum over the whole batch
    would be one call, but would mix the rounding of one sequence into the next.
    """
    layout = time_major(chunk_offsets, states.size(0))
    ordered = gather_rows(states, layout.rows)
    if initial is None:
        running = torch.zeros_like(ordered[: layout.alive[0]])
    else:
        running = gather_rows(initial, layout.ranking[: layout.alive[0]])
    sums = [running]
    start = 0
    for step in range(1, len(layout.alive)):
        n = layout.alive[step]
        running = running[:n] + ordered[start : start + n]
        sums.append(running)
        start += layout.alive[step - 1]
    return gather_rows(torch.cat(sums), layout.places)
