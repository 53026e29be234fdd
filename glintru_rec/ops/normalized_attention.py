"""Ragged linear attention divided by its own weights: a mean of values in place of a sum.

    a_n = q'_nᵀ (Σ_m k'_m v_mᵀ) / (q_n · Σ_m k_m + ε)

The numerator may see other queries and keys than the denominator: rotary ones, whose weights alone could cancel to zero.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values, M chunks of C items.
"""

import torch
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, sequence_index
from glintru_rec.ops.chunks import (
    ChunkLayout,
    chunk_layout,
    from_chunks,
    sums_after,
    sums_before,
    to_chunks,
    total_sums,
)
from glintru_rec.ops.implementation import triton_kernels
from glintru_rec.ops.linear_attention import attend_backward, attend_in_chunks, attention_reference


def normalized_attention_reference(
    q: Tensor, k: Tensor, q_rotary: Tensor, k_rotary: Tensor, v: Tensor, offsets: Tensor, causal: bool, eps: float
) -> Tensor:
    """The truth: one position after another (see `normalized_attention`)."""
    out = list(attention_reference(q_rotary, k_rotary, v, offsets, causal))
    for b in range(offsets.numel() - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        for n in range(start, end):
            weights = (q[n] * k[start : n + 1 if causal else end].sum(0)).sum(1, keepdim=True)
            out[n] = out[n] / (weights + (eps if causal else eps * (end - start)))
    return torch.stack(out) if out else v


def normalized_attention(
    q: Tensor,
    k: Tensor,
    q_rotary: Tensor,
    k_rotary: Tensor,
    v: Tensor,
    offsets: Tensor,
    causal: bool,
    eps: float,
    chunk_size: int = 16,
    implementation: str = "auto",
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
        chunk_size: items handled by one masked matmul of the torch code; changes speed and rounding only.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`).

    Returns:
        ``[T, H, e]``.

    Raises:
        InputError: the implementation is not to be had.
    """
    return continue_normalized(q, k, q_rotary, k_rotary, v, offsets, causal, eps, chunk_size, implementation)[0]


def continue_normalized(
    q: Tensor,
    k: Tensor,
    q_rotary: Tensor,
    k_rotary: Tensor,
    v: Tensor,
    offsets: Tensor,
    causal: bool,
    eps: float,
    chunk_size: int = 16,
    implementation: str = "auto",
    memory: Tensor | None = None,
    key_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend (see `normalized_attention`) from a state, and give the state that goes on from there.

    Args:
        q: see `normalized_attention`, and so on to ``implementation``.
        k: see there.
        q_rotary: see there.
        k_rotary: see there.
        v: see there.
        offsets: see there.
        causal: see there.
        eps: see there.
        chunk_size: see there.
        implementation: see there.
        memory: Σ k' vᵀ over what came before each sequence, ``[B, H, d, e]``; zeros when absent.
        key_sums: Σ k over the same, ``[B, H, d]``; zeros when absent.

    Returns:
        ``[T, H, e]``, and both sums after each sequence's last item (an empty sequence gives back its initial ones).
    """
    if memory is None:
        memory = q.new_zeros([offsets.numel() - 1, q.size(1), q.size(2), v.size(2)])
    if key_sums is None:
        key_sums = q.new_zeros([offsets.numel() - 1, q.size(1), q.size(2)])
    if torch.jit.is_scripting():
        out, memory, key_sums, _ = _attend(q, k, q_rotary, k_rotary, v, memory, key_sums, offsets, causal, eps, chunk_size)
        return out, memory, key_sums
    tensors = [x.contiguous() for x in (q, k, q_rotary, k_rotary, v, memory, key_sums)]
    out, memory, key_sums, _ = _forward(*tensors, offsets, causal, eps, chunk_size, implementation)
    return out, memory, key_sums


def _attend(
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
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass, see `continue_normalized`; the divisors ``[T, H]`` are its last result."""
    num_heads = q.size(1)
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size)
    q, k = to_chunks(q, layout, chunk_size, padded=False), to_chunks(k, layout, chunk_size, padded=True)
    q_rotary = to_chunks(q_rotary, layout, chunk_size, padded=False)
    k_rotary = to_chunks(k_rotary, layout, chunk_size, padded=False)
    v = to_chunks(v, layout, chunk_size, padded=True)
    out, last_memory = attend_in_chunks(q_rotary, k_rotary, v, memory, layout, causal)
    sums, last_key_sums = _running_keys(k, key_sums, layout, causal)
    weights = from_chunks((q * sums).sum(2, keepdim=True), layout, num_heads)
    if causal:
        weights = weights + eps
    else:
        lengths = lengths_from_offsets(offsets)
        weights = weights + eps * lengths[sequence_index(offsets, weights.size(0))].to(weights.dtype).view(-1, 1, 1)
    return from_chunks(out, layout, num_heads) / weights, last_memory, last_key_sums, weights.squeeze(2)


def _running_keys(k: Tensor, key_sums: Tensor, layout: ChunkLayout, causal: bool) -> tuple[Tensor, Tensor]:
    """Sum the keys ``[M*H, C, d]`` that each position sees, ``[M*H, C, d]`` (or ``[M*H, 1, d]``), and those of whole sequences.

    Within a chunk by a matmul with a triangle of ones, three times faster than ``cumsum``.
    """
    totals = k.sum(1).view([layout.owners.numel(), key_sums.size(1), key_sums.size(2)])
    before = sums_before(totals, key_sums, layout)
    last = total_sums(totals, before, key_sums, layout)
    if not causal:
        return last.index_select(0, layout.owners).view([k.size(0), 1, k.size(2)]), last
    return torch.baddbmm(before.view([k.size(0), 1, k.size(2)]), _triangle(k), k), last


def _triangle(k: Tensor) -> Tensor:
    """Ones where position n (row) sees m (column), for every chunk: ``[M*H, C, C]``."""
    return torch.ones([k.size(1), k.size(1)], dtype=k.dtype, device=k.device).tril().expand([k.size(0), -1, -1])


@torch.library.custom_op("glintru_rec::normalized_forward", mutates_args=())
def _forward(
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
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = triton_kernels("normalized", implementation, q, v)
    if kernels is not None:
        return kernels.forward(q, k, q_rotary, k_rotary, v, memory, key_sums, offsets, causal, eps)
    return _attend(q, k, q_rotary, k_rotary, v, memory, key_sums, offsets, causal, eps, chunk_size)


@torch.library.custom_op("glintru_rec::normalized_backward", mutates_args=())
def _backward(
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
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With w the divisors and g the gradient of ``out``: g / w goes on as of the numerator, -(g · a) / w as of w."""
    kernels = triton_kernels("normalized", implementation, q, v)
    if kernels is not None:
        grads = (grad_out, grad_last_memory, grad_last_key_sums)
        inputs = (q, k, q_rotary, k_rotary, v, memory, key_sums, offsets)
        return kernels.backward(*grads, *inputs, out, weights, causal)
    num_heads = q.size(1)
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size)
    grad = grad_out / weights.unsqueeze(2)
    grad_weights = (grad * out).sum(2, keepdim=True).neg_()
    grad_sums, k, grad, v = (to_chunks(x, layout, chunk_size, padded=True) for x in (grad_weights * q, k, grad, v))
    q_rotary, k_rotary = (to_chunks(x, layout, chunk_size, padded=False) for x in (q_rotary, k_rotary))
    *rotary, grad_memory = attend_backward(grad, grad_last_memory, q_rotary, k_rotary, v, memory, layout, causal)
    grad_q_rotary, grad_k_rotary, grad_v = (from_chunks(x, layout, num_heads) for x in rotary)

    sums = _running_keys(k, key_sums, layout, causal)[0].expand_as(k)
    grad_q = from_chunks(sums, layout, num_heads).mul_(grad_weights)
    totals = grad_sums.sum(1).view([layout.owners.numel(), key_sums.size(1), key_sums.size(2)])
    after = sums_after(totals, grad_last_key_sums, layout)
    first = layout.alive[0] if layout.alive else 0
    grad_key_sums = grad_last_key_sums.index_copy(0, layout.owners[:first], after[:first] + totals[:first])
    if causal:
        grad_k = torch.baddbmm(after.view(-1, 1, k.size(2)), _triangle(k).transpose(1, 2), grad_sums)
    else:
        grad_k = grad_key_sums.index_select(0, layout.owners).view(-1, 1, k.size(2)).expand_as(k)
    grad_k = from_chunks(grad_k, layout, num_heads)
    return grad_q, grad_k, grad_q_rotary, grad_k_rotary, grad_v, grad_memory, grad_key_sums


@_forward.register_fake
def _(q, k, q_rotary, k_rotary, v, memory, key_sums, offsets, causal, eps, chunk_size, implementation):
    return torch.empty_like(v), torch.empty_like(memory), torch.empty_like(key_sums), q.new_empty(q.shape[:2])


@_backward.register_fake
def _(
    grad_out,
    grad_last_memory,
    grad_last_key_sums,
    q,
    k,
    q_rotary,
    k_rotary,
    v,
    memory,
    key_sums,
    offsets,
    out,
    weights,
    causal,
    chunk_size,
    implementation,
):
    return tuple(torch.empty_like(x) for x in (q, k, q_rotary, k_rotary, v, memory, key_sums))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal, _, ctx.chunk_size, ctx.implementation = inputs
    out, _, _, weights = output
    ctx.save_for_backward(*tensors, out, weights)
    ctx.mark_non_differentiable(weights)


def _gradients(ctx, grad_out: Tensor, grad_memory: Tensor, grad_key_sums: Tensor, _):
    grads = [grad.contiguous() for grad in (grad_out, grad_memory, grad_key_sums)]
    grads = _backward(*grads, *ctx.saved_tensors, ctx.causal, ctx.chunk_size, ctx.implementation)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
