"""Ragged linear attention: ``a_n = q_nᵀ Σ_m k_m v_mᵀ`` over the items of one sequence.

Causal (``m ≤ n``) works in chunks: within a chunk by a masked ``q kᵀ v``, between chunks by the running sum S of ``k vᵀ``, so
time and memory grow linearly with the history. Chunks start at each sequence's own first item: a sequence's result does not
depend on what else is in the batch.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values, M chunks of C items.
"""

import torch
from torch import Tensor

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


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    causal: bool,
    chunk_size: int = 16,
    implementation: str = "auto",
) -> Tensor:
    """Attend over every sequence of a ragged batch without a softmax.

    Args:
        q: queries, ``[T, H, d]``.
        k: keys, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        offsets: int64 ``[B + 1]``.
        causal: position n attends to items ``1 .. n``; otherwise to all items of its sequence.
        chunk_size: items handled by one masked matmul of the torch code; changes speed and rounding only.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`).

    Returns:
        ``[T, H, e]``.

    Raises:
        InputError: the implementation is not to be had.
    """
    return _from_state(q, k, v, offsets, None, causal, chunk_size, implementation)[0]


def continue_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    initial: Tensor | None = None,
    chunk_size: int = 16,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend causally (see `linear_attention`) from a state, and give the state that goes on from there.

    Args:
        q: queries, ``[T, H, d]``.
        k: keys, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        offsets: int64 ``[B + 1]``.
        initial: Σ k vᵀ over what came before each sequence, ``[B, H, d, e]``; zeros when absent.
        chunk_size: see `linear_attention`.
        implementation: see `linear_attention`.

    Returns:
        ``[T, H, e]``, and Σ k vᵀ after each sequence's last item, ``[B, H, d, e]`` (an empty sequence gives back its
        initial state).
    """
    return _from_state(q, k, v, offsets, initial, True, chunk_size, implementation)


def _from_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    initial: Tensor | None,
    causal: bool,
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if initial is None:
        initial = q.new_zeros([offsets.numel() - 1, q.size(1), q.size(2), v.size(2)])
    if torch.jit.is_scripting():
        return _attend(q, k, v, initial, offsets, causal, chunk_size)
    q, k, v, initial = q.contiguous(), k.contiguous(), v.contiguous(), initial.contiguous()
    return _forward(q, k, v, initial, offsets, causal, chunk_size, implementation)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, offsets: Tensor, causal: bool, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Forward pass, see `continue_attention`."""
    num_heads = q.size(1)
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size)
    q = to_chunks(q, layout, chunk_size, padded=False)
    k, v = to_chunks(k, layout, chunk_size, padded=False), to_chunks(v, layout, chunk_size, padded=True)
    out, last = attend_in_chunks(q, k, v, initial, layout, causal)
    return from_chunks(out, layout, num_heads), last


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, layout: ChunkLayout, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend from a state, all in chunks: ``q, k [M*H, C, d]``, ``v [M*H, C, e]`` with zeros as padding."""
    sums = torch.bmm(k.transpose(1, 2), v).view([layout.owners.numel(), initial.size(1), initial.size(2), initial.size(3)])
    before = sums_before(sums, initial, layout)
    last = total_sums(sums, before, initial, layout)
    if not causal:
        return torch.bmm(q, last.index_select(0, layout.owners).view([q.size(0), q.size(2), v.size(2)])), last
    scores = torch.bmm(q, k.transpose(1, 2)).tril_()
    return torch.bmm(scores, v).baddbmm_(q, before.view([q.size(0), q.size(2), v.size(2)])), last


def attend_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    layout: ChunkLayout,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of `attend_in_chunks`; ``grad_out`` has zeros as padding too.

    With A = q kᵀ of a chunk, masked, S its state and R the gradient of the state after it, Σ q gᵀ of all later items::

        ∂q = (g vᵀ)ₘ k + g Sᵀ        ∂k = (g vᵀ)ₘᵀ q + v Rᵀ        ∂v = Aᵀ g + k R

    Not causal, the chunk's part in S and R is that of the whole sequence, and the masked terms are not there.
    """
    shape = [layout.owners.numel(), *initial.shape[1:]]
    flat = [q.size(0), q.size(2), v.size(2)]
    sums = torch.bmm(k.transpose(1, 2), v).view(shape)
    state = sums_before(sums, initial, layout)
    grad_sums = torch.bmm(q.transpose(1, 2), grad_out).view(shape)
    after = sums_after(grad_sums, grad_last, layout)
    first = layout.alive[0] if len(layout.alive) > 0 else 0
    grad_initial = grad_last.index_copy(0, layout.owners[:first], after[:first] + grad_sums[:first])
    if not causal:
        state = total_sums(sums, state, initial, layout).index_select(0, layout.owners).view(flat)
        after = grad_initial.index_select(0, layout.owners).view(flat)
        grad_q, grad_k = torch.bmm(grad_out, state.transpose(1, 2)), torch.bmm(v, after.transpose(1, 2))
        return grad_q, grad_k, torch.bmm(k, after), grad_initial
    state, after = state.view(flat), after.view(flat)
    scores, grad_scores = torch.bmm(q, k.transpose(1, 2)).tril_(), torch.bmm(grad_out, v.transpose(1, 2)).tril_()
    grad_q = torch.bmm(grad_scores, k).baddbmm_(grad_out, state.transpose(1, 2))
    grad_k = torch.bmm(grad_scores.transpose(1, 2), q).baddbmm_(v, after.transpose(1, 2))
    grad_v = torch.bmm(scores.transpose(1, 2), grad_out).baddbmm_(k, after)
    return grad_q, grad_k, grad_v, grad_initial


@torch.library.custom_op("glintru_rec::attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    offsets: Tensor,
    causal: bool,
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("attention", implementation, q, v)
    if kernels is not None:
        return kernels.forward(q, k, v, initial, offsets, causal)
    return _attend(q, k, v, initial, offsets, causal, chunk_size)


@torch.library.custom_op("glintru_rec::attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    offsets: Tensor,
    causal: bool,
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = triton_kernels("attention", implementation, q, v)
    if kernels is not None:
        return kernels.backward(grad_out, grad_last, q, k, v, initial, offsets, causal)
    num_heads = q.size(1)
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size)
    grad_out, v = (to_chunks(x, layout, chunk_size, padded=True) for x in (grad_out, v))
    q, k = (to_chunks(x, layout, chunk_size, padded=False) for x in (q, k))
    *grads, grad_initial = attend_backward(grad_out, grad_last, q, k, v, initial, layout, causal)
    grad_q, grad_k, grad_v = (from_chunks(grad, layout, num_heads) for grad in grads)
    return grad_q, grad_k, grad_v, grad_initial


@_forward.register_fake
def _(q, k, v, initial, offsets, causal, chunk_size, implementation):
    return torch.empty_like(v), torch.empty_like(initial)


@_backward.register_fake
def _(grad_out, grad_last, q, k, v, initial, offsets, causal, chunk_size, implementation):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(initial)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.chunk_size, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_out: Tensor, grad_last: Tensor):
    options = (ctx.causal, ctx.chunk_size, ctx.implementation)
    grads = _backward(grad_out.contiguous(), grad_last.contiguous(), *ctx.saved_tensors, *options)
    return (*grads, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
