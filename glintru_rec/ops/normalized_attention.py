"""Ragged linear attention divided by its own weights: a mean of values in place of a sum.

    a_n = q'_nᵀ (Σ_m k'_m v_mᵀ) / (q_n · Σ_m k_m + ε)

The numerator may see other queries and keys than the denominator: rotary ones, whose weights alone could cancel to zero.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values.
"""

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths, sequence_index
from glintru_rec.ops.linear_attention import attention_reference, linear_attention, sums_before
from glintru_rec.ops.rows import gather_rows, scatter_rows


def normalized_attention_reference(
    q: Tensor, k: Tensor, q_rotary: Tensor, k_rotary: Tensor, v: Tensor, offsets: Tensor, causal: bool, eps: float
) -> Tensor:
    """The truth: one position after another (see `normalized_attention`)."""
    out = attention_reference(q_rotary, k_rotary, v, offsets, causal)
    for b in range(offsets.numel() - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        for n in range(start, end):
            weights = (q[n] * k[start : n + 1 if causal else end].sum(0)).sum(1, keepdim=True)
            out[n] = out[n] / (weights + (eps if causal else eps * (end - start)))
    return out


def normalized_attention(
    q: Tensor, k: Tensor, q_rotary: Tensor, k_rotary: Tensor, v: Tensor, offsets: Tensor, causal: bool, eps: float
) -> Tensor:
    """Attend over every sequence of a ragged batch, weights summing to one.

    Args:
        q: positive queries of the denominator, ``[T, H, d]``.
        k: positive keys of the denominator, ``[T, H, d]``.
        q_rotary: queries of the numerator, ``[T, H, d]``.
        k_rotary: keys of the numerator, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        offsets: int64 ``[B + 1]``.
        causal: position n attends to items ``1 .. n``; otherwise to all items of its sequence.
        eps: ε on the sum of weights; on their mean over the N items of the sequence where not causal.

    Returns:
        ``[T, H, e]``.
    """
    numerator = linear_attention(q_rotary, k_rotary, v, offsets, causal)
    if causal:
        sums, _ = running_sum(k, offsets)
        return numerator / ((q * sums).sum(2, keepdim=True) + eps)
    lengths = lengths_from_offsets(offsets)
    index = sequence_index(offsets, k.size(0))
    totals = torch.zeros([lengths.numel(), k.size(1), k.size(2)], dtype=k.dtype, device=k.device).index_add(0, index, k)
    weights = (q * totals.index_select(0, index)).sum(2, keepdim=True)
    return numerator / (weights + eps * lengths[index].to(k.dtype).view(-1, 1, 1))


def running_sum(x: Tensor, offsets: Tensor, chunk_size: int = 16) -> tuple[Tensor, Tensor]:
    """Sum the items of every sequence up to each one.

    In chunks that start at each sequence's own first item, as `linear_attention`: within a chunk by a matmul with a
    triangle of ones, three times faster than ``cumsum`` forward and backward.

    Args:
        x: ``[T, H, d]``.
        offsets: int64 ``[B + 1]``.
        chunk_size: items summed by one matmul; changes speed and rounding only.

    Returns:
        The sum after every item, ``[T, H, d]``, and of each whole sequence, ``[B, H, d]`` (zeros for an empty one).
    """
    num_items, num_heads, width = x.shape
    num_sequences = offsets.numel() - 1
    if num_items == 0:
        return x, torch.zeros([num_sequences, num_heads, width], dtype=x.dtype, device=x.device)
    chunk_offsets = offsets_from_lengths((lengths_from_offsets(offsets) + (chunk_size - 1)) // chunk_size)
    num_chunks = int(chunk_offsets[-1].item())
    index = sequence_index(offsets, num_items)
    slots = torch.arange(num_items, device=x.device) - offsets[:-1][index] + chunk_offsets[:-1][index] * chunk_size
    chunks = scatter_rows(x.reshape(num_items, num_heads * width), slots, num_chunks * chunk_size)
    triangle = torch.ones([chunk_size, chunk_size], dtype=x.dtype, device=x.device).tril()
    sums = torch.matmul(triangle, chunks.view(num_chunks, chunk_size, num_heads * width))
    sums = sums + sums_before(sums[:, -1], chunk_offsets, None).unsqueeze(1)
    filled = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
    last = scatter_rows(gather_rows(sums[:, -1], chunk_offsets[1:][filled] - 1), filled, num_sequences)
    sums = gather_rows(sums.view(num_chunks * chunk_size, num_heads * width), slots)
    return sums.view(num_items, num_heads, width), last.view(num_sequences, num_heads, width)
