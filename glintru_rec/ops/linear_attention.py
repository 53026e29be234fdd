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
    return _from_state(q, k, v, offsets, None, False, causal, chunk_size, implementation)[0]


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
    return _from_state(q, k, v, offsets, initial, True, True, chunk_size, implementation)


def _from_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    initial: Tensor | None,
    stateful: bool,
    causal: bool,
    chunk_size: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if initial is None:
        initial = q.new_zeros([offsets.numel() - 1 if stateful else 0, q.size(1), q.size(2), v.size(2)])
    if torch.jit.is_scripting():
        return _attend(q, k, v, initial, offsets, causal, chunk_size)
    q, k, v, initial = q.contiguous(), k.contiguous(), v.contiguous(), initial.contiguous()
    return _forward(q, k, v, initial, offsets, causal, chunk_size, implementation)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, offsets: Tensor, causal: bool, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Forward pass, see `continue_attention`; without initial states, ``[0, H, d, e]``, there are no last ones."""
    num_heads, stateful = q.size(1), initial.size(0) == offsets.numel() - 1
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size, stateful)
    q, k = to_chunks(q, layout, padded=False), to_chunks(k, layout, padded=False)
    out, last = attend_in_chunks(q, k, to_chunks(v, layout, padded=True), initial, layout, causal)
    return from_chunks(out, layout, num_heads), last


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, layout: ChunkLayout, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend from a state, all in slots: ``q, k [S, d]``, ``v [S, e]`` with zeros as padding."""
    parts: list[Tensor] = []
    for block in layout.blocks:
        scores = torch.bmm(in_block(q, block), in_block(k, block).transpose(1, 2))
        if causal:
            scores.tril_()
        parts.append(torch.bmm(scores, in_block(v, block)).view([-1, v.size(1)]))
    q, k, v = in_chunks(q, layout), in_chunks(k, layout), in_chunks(v, layout)
    states = all_states(initial, layout.num_sequences)
    sums = torch.bmm(k.transpose(1, 2), v).view([layout.owners.numel(), states.size(1), states.size(2), states.size(3)])
    before = sums_before(sums, states, layout)
    last = total_sums(sums, before, states, layout)
    if causal:
        scores = torch.bmm(q, k.transpose(1, 2)).tril_()
        out = torch.bmm(scores, v).baddbmm_(q, before.view([q.size(0), q.size(2), v.size(2)]))
    else:
        out = torch.bmm(q, last.index_select(0, layout.owners).view([q.size(0), q.size(2), v.size(2)]))
    parts.append(out.view([out.size(0) * out.size(1), out.size(2)]))
    return torch.cat(parts), last[: initial.size(0)]


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

    Blocks have no state. Not causal, a chunk's S and R are those of its whole sequence, and the masked terms are not there.
    """
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for block in layout.blocks:
        of_block = [in_block(x, block) for x in (grad_out, q, k, v, grad_q, grad_k, grad_v)]
        _backward_within(causal, *of_block)
    grad_out, q, k, v = (in_chunks(x, layout) for x in (grad_out, q, k, v))
    of_chunks = [in_chunks(x, layout) for x in (grad_q, grad_k, grad_v)]
    states, flat = all_states(initial, layout.num_sequences), [q.size(0), q.size(2), v.size(2)]
    shape = [layout.owners.numel(), *states.shape[1:]]
    sums = torch.bmm(k.transpose(1, 2), v).view(shape)
    state = sums_before(sums, states, layout)
    grad_sums = torch.bmm(q.transpose(1, 2), grad_out).view(shape)
    grad_states = all_states(grad_last, layout.num_sequences)
    after = sums_after(grad_sums, grad_states, layout)
    first = layout.alive[0] if layout.alive else 0
    grad_initial = grad_states.index_copy(0, layout.owners[:first], after[:first] + grad_sums[:first])
    if causal:
        state, after = state.view(flat), after.view(flat)
        _backward_within(causal, grad_out, q, k, v, *of_chunks)
        of_chunks[0].baddbmm_(grad_out, state.transpose(1, 2))
        of_chunks[1].baddbmm_(v, after.transpose(1, 2))
        of_chunks[2].baddbmm_(k, after)
    else:
        state = total_sums(sums, state, states, layout).index_select(0, layout.owners).view(flat)
        after = grad_initial.index_select(0, layout.owners).view(flat)
        torch.bmm(grad_out, state.transpose(1, 2), out=of_chunks[0])
        torch.bmm(v, after.transpose(1, 2), out=of_chunks[1])
        torch.bmm(k, after, out=of_chunks[2])
    return grad_q, grad_k, grad_v, grad_initial[: initial.size(0)]


def _backward_within(
    causal: bool, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Write into the last three what items of a piece are to each other, all ``[*, L, ...]``."""
    scores, grad_scores = torch.bmm(q, k.transpose(1, 2)), torch.bmm(grad_out, v.transpose(1, 2))
    if causal:
        scores.tril_()
        grad_scores.tril_()
    torch.bmm(grad_scores, k, out=grad_q)
    torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
    torch.bmm(scores.transpose(1, 2), grad_out, out=grad_v)


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
        out, last = kernels.forward(q, k, v, all_states(initial, offsets.numel() - 1), offsets, causal)
        return out, last[: initial.size(0)]
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
        grad_states, states = (all_states(x, offsets.numel() - 1) for x in (grad_last, initial))
        *grads, grad_initial = kernels.backward(grad_out, grad_states, q, k, v, states, offsets, causal)
        return (*grads, grad_initial[: initial.size(0)])
    num_heads, stateful = q.size(1), initial.size(0) == offsets.numel() - 1
    layout = chunk_layout(offsets, q.size(0), num_heads, chunk_size, stateful)
    grad_out, v = (to_chunks(x, layout, padded=True) for x in (grad_out, v))
    q, k = (to_chunks(x, layout, padded=False) for x in (q, k))
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
under_autocast(_forward, torch.float32)
