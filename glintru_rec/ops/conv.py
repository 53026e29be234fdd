"""Ragged 1-D convolution: ``torch.nn.Conv1d`` within each sequence, zeros beyond its ends.

Shapes: T items, D_in and D_out channels, k taps.
"""

import torch
from torch import Tensor
from torch.nn import functional

from glintru_rec.jagged import lengths_from_offsets, positions, sequence_index


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """The truth: one item, one tap after another (see `ragged_conv1d`)."""
    taps = weight.size(2)
    out = []
    for b in range(offsets.numel() - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        for n in range(start, end):
            y = bias.clone()
            for j in range(taps):
                m = n + j - (taps - 1 if causal else (taps - 1) // 2)
                if start <= m < end:
                    y = y + weight[:, :, j] @ x[m]
            out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, weight.size(0))


def ragged_conv1d(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Convolve every sequence of a ragged batch over time.

    Args:
        x: ``[T, D_in]``.
        weight: as ``torch.nn.Conv1d.weight``, ``[D_out, D_in, k]``.
        bias: ``[D_out]``.
        offsets: int64 ``[B + 1]``.
        causal: position n reads items ``n-k+1 .. n``; otherwise the k items centred on n.

    Returns:
        ``[T, D_out]``.
    """
    num_items = x.size(0)
    taps = weight.size(2)
    ahead = 0 if causal else taps - 1 - (taps - 1) // 2
    position = positions(offsets, num_items)
    remaining = torch.empty(0)
    if ahead > 0:
        remaining = lengths_from_offsets(offsets)[sequence_index(offsets, num_items)] - position
    columns: list[Tensor] = []
    for j in range(taps):
        shift = j - (taps - 1) + ahead  # reads item n + shift
        if shift < 0:
            outside = (position < -shift).unsqueeze(1)
            columns.append(functional.pad(x, [0, 0, -shift, 0])[:num_items].masked_fill(outside, 0.0))
        elif shift > 0:
            outside = (remaining <= shift).unsqueeze(1)
            columns.append(functional.pad(x, [0, 0, 0, shift])[shift:].masked_fill(outside, 0.0))
        else:
            columns.append(x)
    # One matmul over the k shifted views: [T, k*D_in] x [k*D_in, D_out].
    flat_weight = weight.permute(2, 1, 0).reshape(taps * weight.size(1), weight.size(0))
    return torch.addmm(bias, torch.cat(columns, dim=1), flat_weight)
