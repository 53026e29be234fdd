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
    all_states,
    chunk_layout,
    from_chunks,
    in_block,
    in_chunks,
    sums_after,
    sums_before,
    to_chunks,
    total_sums,
)
from glintru_rec.ops.implementation import triton_kernels, under_autocast
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
    memory, key_sums = q.new_zeros([0, q.size(1), q.size(2), v.size(2)]), q.new_zeros([0, q.size(1), q.size(2)])
    options = (causal, eps, chunk_size, implementation)
    return continue_normalized(q, k, q_rotary, k_rotary, v, offsets, *options, memory, key_sums)[0]


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
    num_heads, stateful = q.size(1), memory.size(0) == offsets.numel() - 1
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size, stateful)
    q, k = to_chunks(q, layout, padded=False), to_chunks(k, layout, padded=True)
    q_rotary, k_rotary = to_chunks(q_rotary, layout, padded=False), to_chunks(k_rotary, layout, padded=False)
    out, last_memory = attend_in_chunks(q_rotary, k_rotary, to_chunks(v, layout, padded=True), memory, layout, causal)
    sums, last_key_sums = _running_keys(k, key_sums, layout, causal)
    weights = from_chunks((sums * q).sum(1, keepdim=True), layout, num_heads)
    if causal:
        weights = weights + eps
    else:
        lengths = lengths_from_offsets(offsets)
        weights = weights + eps * lengths[sequence_index(offsets, weights.size(0))].to(weights.dtype).view(-1, 1, 1)
    return from_chunks(out, layout, num_heads) / weights, last_memory, last_key_sums, weights.squeeze(2)


def _running_keys(k: Tensor, key_sums: Tensor, layout: ChunkLayout, causal: bool) -> tuple[Tensor, Tensor]:
    """Sum the keys ``[S, d]`` that each position sees, ``[S, d]``, and those of the sequences whose state is kept.

    Within a piece by a matmul with a triangle of ones, three times faster than ``cumsum``.
    """
    parts: list[Tensor] = []
    for block in layout.blocks:
        keys = in_block(k, block)
        sums = torch.bmm(_triangle(keys), keys) if causal else keys.sum(1, keepdim=True).expand_as(keys)
        parts.append(sums.reshape([-1, k.size(1)]))
    keys, states = in_chunks(k, layout), all_states(key_sums, layout.num_sequences)
    totals = keys.sum(1).view([layout.owners.numel(), states.size(1), states.size(2)])
    before = sums_before(totals, states, layout)
    last = total_sums(totals, before, states, layout)
    if causal:
        sums = torch.baddbmm(before.view([keys.size(0), 1, keys.size(2)]), _triangle(keys), keys)
    else:
        sums = last.index_select(0, layout.owners).view([keys.size(0), 1, keys.size(2)]).expand_as(keys)
    parts.append(sums.reshape([keys.size(0) * keys.size(1), keys.size(2)]))
    return torch.cat(parts), last[: key_sums.size(0)]


def _running_keys_backward(grad_sums: Tensor, grad_last: Tensor, layout: ChunkLayout, causal: bool) -> tuple[Tensor, Tensor]:
    """Give the gradients of `_running_keys`: sums the other way round, of later positions."""
    out = torch.empty_like(grad_sums)
    for block in layout.blocks:
        grads, result = in_block(grad_sums, block), in_block(out, block)
        if causal:
            torch.bmm(_triangle(grads).transpose(1, 2), grads, out=result)
        else:
            result.copy_(grads.sum(1, keepdim=True))
    grads, result = in_chunks(grad_sums, layout), in_chunks(out, layout)
    states = all_states(grad_last, layout.num_sequences)
    totals = grads.sum(1).view([layout.owners.numel(), *states.shape[1:]])
    after = sums_after(totals, states, layout)
    first = layout.alive[0] if layout.alive else 0
    grad_initial = states.index_copy(0, layout.owners[:first], after[:first] + totals[:first])
    if causal:
        torch.baddbmm(after.view([grads.size(0), 1, grads.size(2)]), _triangle(grads).transpose(1, 2), grads, out=result)
    else:
        result.copy_(grad_initial.index_select(0, layout.owners).view([grads.size(0), 1, grads.size(2)]))
    return out, grad_initial[: grad_last.size(0)]


def _triangle(k: Tensor) -> Tensor:
    """Ones where position n (row) sees m (column), for every piece ``[*, L, d]``: ``[*, L, L]``."""
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
        states = (all_states(x, offsets.numel() - 1) for x in (memory, key_sums))
        out, *last, weights = kernels.forward(q, k, q_rotary, k_rotary, v, *states, offsets, causal, eps)
        return out, *(x[: memory.size(0)] for x in last), weights
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
        states = [all_states(x, offsets.numel() - 1) for x in (grad_last_memory, grad_last_key_sums, memory, key_sums)]
        inputs = (*states[:2], q, k, q_rotary, k_rotary, v, *states[2:], offsets)
        *grads, grad_memory, grad_key_sums = kernels.backward(grad_out, *inputs, out, weights, causal)
        return *grads, grad_memory[: memory.size(0)], grad_key_sums[: memory.size(0)]
    num_heads, stateful = q.size(1), memory.size(0) == offsets.numel() - 1
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size, stateful)
    grad = grad_out / weights.unsqueeze(2)
    grad_weights = (grad * out).sum(2, keepdim=True).neg_()
    grad_sums, k, grad, v = (to_chunks(x, layout, padded=True) for x in (grad_weights * q, k, grad, v))
    q_rotary, k_rotary = (to_chunks(x, layout, padded=False) for x in (q_rotary, k_rotary))
    *rotary, grad_memory = attend_backward(grad, grad_last_memory, q_rotary, k_rotary, v, memory, layout, causal)
    grad_q_rotary, grad_k_rotary, grad_v = (from_chunks(x, layout, num_heads) for x in rotary)
    sums, _ = _running_keys(k, key_sums, layout, causal)
    grad_q = from_chunks(sums, layout, num_heads).mul_(grad_weights)
    grad_k, grad_key_sums = _running_keys_backward(grad_sums, grad_last_key_sums, layout, causal)
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
under_autocast(_forward, torch.float32)
