"""Ragged normalised linear attention on a GPU: the kernels of `glintru_rec.ops.normalized_attention`.

    a_n = q'_nᵀ M_n / (q_n · s_n + ε),    M_n = M_0 + Σ_m k'_m v_mᵀ,    s_n = s_0 + Σ_m k_m

Both sums are linear attention; the divisor's has values of one feature, 1. So the kernel of `triton_attention` runs twice, and
what is left is elementwise.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values.
"""

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, sequence_index
from glintru_rec.ops import triton_attention


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take queries ``[T, H, d]`` and values ``[T, H, e]`` of such dtype and widths."""
    return triton_attention.takes(q, v)


def forward(
    q: Tensor,
    k: Tensor,
    q_rotary: Tensor,
    k_rotary: Tensor,
    v: Tensor,
    memory: Tensor,
    key_sums: Tensor,
    offsets: Tensor,
    causal: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend over every sequence of a ragged batch, weights summing to one. All tensors are contiguous and of one dtype.

    Args:
        q: queries of the divisor, ``[T, H, d]``.
        k: keys of the divisor, ``[T, H, d]``.
        q_rotary: queries of the numerator, ``[T, H, d]``.
        k_rotary: keys of the numerator, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        memory: M_0 of each sequence, ``[B, H, d, e]``.
        key_sums: s_0 of each sequence, ``[B, H, d]``.
        offsets: int64 ``[B + 1]``, from 0 to T.
        causal: position n attends to items ``1 .. n``; otherwise to all N items of its sequence, with N ε for ε.
        eps: ε.

    Returns:
        ``[T, H, e]``, M ``[B, H, d, e]`` and s ``[B, H, d]`` over each whole sequence, and the divisors, ``[T, H]``.

    Raises:
        InputError: a dtype or a width that the kernels do not take.
    """
    numerator, last_memory = triton_attention.forward(q_rotary, k_rotary, v, memory, offsets, causal)
    ones = v.new_ones(v.size(0), v.size(1), 1)
    weights, last_key_sums = triton_attention.forward(q, k, ones, key_sums.unsqueeze(3), offsets, causal)
    if causal:
        weights += eps
    else:
        lengths = lengths_from_offsets(offsets)[sequence_index(offsets, v.size(0))]
        weights += eps * lengths.to(v.dtype).view(-1, 1, 1)
    return numerator.div_(weights), last_memory, last_key_sums.squeeze(3), weights.squeeze(2)


def backward(
    grad_out: Tensor,
    grad_last_memory: Tensor,
    grad_last_key_sums: Tensor,
    q: Tensor,
    k: Tensor,
    q_rotary: Tensor,
    k_rotary: Tensor,
    v: Tensor,
    memory: Tensor,
    key_sums: Tensor,
    offsets: Tensor,
    out: Tensor,
    weights: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_out: gradient of the result, ``[T, H, e]``.
        grad_last_memory: gradient of M, ``[B, H, d, e]``.
        grad_last_key_sums: gradient of s, ``[B, H, d]``.
        q: as given to `forward`.
        k: likewise.
        q_rotary: likewise.
        k_rotary: likewise.
        v: likewise.
        memory: likewise.
        key_sums: likewise.
        offsets: likewise.
        out: the result, ``[T, H, e]``.
        weights: the divisors, ``[T, H]``.
        causal: as given to `forward`.

    Returns:
        Gradients of ``q``, ``k``, ``q_rotary``, ``k_rotary``, ``v``, ``memory`` and ``key_sums``.
    """
    grad_numerator = grad_out / weights.unsqueeze(2)
    grad_weights = -(grad_numerator * out).sum(2, keepdim=True)
    ones = torch.ones_like(grad_weights)
    grad_q, grad_k, _, grad_key_sums = triton_attention.backward(
        grad_weights, grad_last_key_sums.unsqueeze(3), q, k, ones, key_sums.unsqueeze(3), offsets, causal
    )
    grad_q_rotary, grad_k_rotary, grad_v, grad_memory = triton_attention.backward(
        grad_numerator, grad_last_memory, q_rotary, k_rotary, v, memory, offsets, causal
    )
    return grad_q, grad_k, grad_q_rotary, grad_k_rotary, grad_v, grad_memory, grad_key_sums.squeeze(3)
