"""Ragged linear attention: ``a_n = q_nᵀ Σ_m k_m v_mᵀ`` over the items of one sequence.

Causal (``m ≤ n``) works in chunks: within a chunk by a masked ``q kᵀ v``, between chunks by the running sum of
``k vᵀ``, so time and memory grow linearly with the history. Chunks start at each sequence's own first item: a sequence's
result does not depend on what else is in the batch.

Shapes: T items, B sequences, H heads, d features a head, M chunks of C items.
"""

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
        v: values, ``[T, H, d]``.
        offsets: int64 ``[B + 1]``.
        causal: position n attends to items ``1 .. n``; otherwise to all items of its sequence.
        chunk_size: items handled by one masked matmul; changes speed and rounding only.

    Returns:
        ``[T, H, d]``.
    """
    num_items, num_heads, width = q.shape
    if num_items == 0:
        return q * k * v
    chunks = (lengths_from_offsets(offsets) + (chunk_size - 1)) // chunk_size
    chunk_offsets = offsets_from_lengths(chunks)
    num_chunks = int(chunk_offsets[-1].item())
    index = sequence_index(offsets, num_items)
    # Slot of each item when every sequence starts a chunk of its own; slots past a sequence's end stay zero.
    slots = torch.arange(num_items, device=q.device) - offsets[:-1][index] + chunk_offsets[:-1][index] * chunk_size
    packed = scatter_rows(torch.stack([q, k, v], dim=1), slots, num_chunks * chunk_size)
    packed = packed.view(num_chunks, chunk_size, 3, num_heads, width).permute(2, 0, 3, 1, 4).contiguous()
    q_chunk, k_chunk, v_chunk = packed[0], packed[1], packed[2]  # [M, H, C, d]
    states = torch.matmul(k_chunk.transpose(2, 3), v_chunk)  # Σ k vᵀ of each chunk, [M, H, d, d]
    if causal:
        weights = torch.matmul(q_chunk, k_chunk.transpose(2, 3)).tril()
        out = torch.matmul(weights, v_chunk)
        if num_chunks > chunks.count_nonzero():
            out = out + torch.matmul(q_chunk, _sums_before(states, chunk_offsets))
    else:
        totals = torch.zeros([chunks.numel(), num_heads, width, width], dtype=q.dtype, device=q.device)
        chunk_index = sequence_index(chunk_offsets, num_chunks)
        totals = totals.index_add(0, chunk_index, states)
        out = torch.matmul(q_chunk, totals.index_select(0, chunk_index))
    out = out.transpose(1, 2).reshape(num_chunks * chunk_size, num_heads, width)
    return gather_rows(out, slots)


def _sums_before(states: Tensor, chunk_offsets: Tensor) -> Tensor:
    """Sum the states of a sequence's earlier chunks, for every chunk: ``[M, H, d, d]``.

    A loop over chunk numbers, vectorised over the sequences that have that many; a cumulative sum over the whole batch
    would be one call, but would mix the rounding of one sequence into the next.
    """
    layout = time_major(chunk_offsets, states.size(0))
    ordered = gather_rows(states, layout.rows)
    running = torch.zeros_like(ordered[: layout.alive[0]])
    sums = [running]
    start = 0
    for step in range(1, len(layout.alive)):
        n = layout.alive[step]
        running = running[:n] + ordered[start : start + n]
        sums.append(running)
        start += layout.alive[step - 1]
    return gather_rows(torch.cat(sums), layout.places)
