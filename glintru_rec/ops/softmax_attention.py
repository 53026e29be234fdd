"""Causal softmax attention over ragged sequences, cut into windows of a bounded number of items.

Padding exists in here only; it follows the items, where no item looks.

Shapes: T items, B sequences, W windows, H heads, D width, d = D / H, L padded length of a group of windows.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths, positions, sequence_index
from glintru_rec.ops.dropout import dropout_seed


def softmax_reference(qkv: Tensor, offsets: Tensor, num_heads: int, span: int) -> Tensor:
    """The truth: one position after another, without dropout (see `softmax_attention`)."""
    width = qkv.size(1) // 3
    q, k, v = (x.reshape(-1, num_heads, width // num_heads) for x in qkv.split(width, dim=1))
    out = []
    windows = window_offsets(offsets, span)
    for start, end in zip(windows[:-1].tolist(), windows[1:].tolist()):
        for n in range(start, end):
            scores = (q[n] * k[start : n + 1]).sum(2) / math.sqrt(width // num_heads)
            out.append((torch.softmax(scores, 0).unsqueeze(2) * v[start : n + 1]).sum(0).flatten())
    return torch.stack(out) if out else qkv[:, :width]


def window_offsets(offsets: Tensor, size: int) -> Tensor:
    """Cut every sequence, from its end, into windows of ``size`` items; the first one holds what is left.

    Args:
        offsets: int64 ``[B + 1]``.
        size: at least 1.

    Returns:
        int64 ``[W + 1]``, from 0 to T; no window is empty.
    """
    windows = offsets_from_lengths((lengths_from_offsets(offsets) + (size - 1)) // size)
    index = sequence_index(windows, int(windows[-1].item()))
    later = windows[1:][index] - torch.arange(index.numel(), device=offsets.device) - 1
    return torch.cat([offsets[:1], offsets[1:][index] - later * size])


def window_positions(offsets: Tensor, num_items: int, size: int) -> Tensor:
    """Give, for every item of the batch, its position in its window, from 0: int64 ``[T]``."""
    ends = offsets[1:][sequence_index(offsets, num_items)]
    before = positions(offsets, num_items)
    later = ends - torch.arange(num_items, device=offsets.device) - 1  # items after it, in its sequence
    length = before + later + 1
    return before - (length - (later // size + 1) * size).clamp(min=0)


class PaddedGroup(NamedTuple):
    """Windows of about the same length, which attention pads to one."""

    rows: Tensor
    """Their items among the T of the batch, int64."""
    slots: Tensor
    """Place of each of these items among ``num_windows * length``, int64."""
    num_windows: int
    length: int


def padded_groups(offsets: Tensor, num_items: int, shortest: int = 8) -> tuple[list[PaddedGroup], Tensor]:
    """Group windows by the power of two that holds them: at most half of a padded window is padding.

    A window's padded length depends on its own length alone, so on nothing else in the batch.

    Args:
        offsets: int64 ``[W + 1]``.
        num_items: T.
        shortest: padded length of the first group, whatever its windows' lengths.

    Returns:
        The groups, and where each item's row is when their rows are joined, int64 ``[T]``.
    """
    lengths = lengths_from_offsets(offsets)
    index = sequence_index(offsets, num_items)
    position = positions(offsets, num_items)
    longest = 0
    if lengths.numel() > 0:
        longest = int(lengths.max().item())
    groups: list[PaddedGroup] = []
    below, length = 0, shortest
    while below < longest:
        chosen = (lengths > below) & (lengths <= length)
        rows = chosen[index].nonzero().squeeze(1)
        if rows.numel() > 0:
            slots = (chosen.cumsum(0) - 1)[index[rows]] * length + position[rows]
            groups.append(PaddedGroup(rows, slots, int(chosen.sum().item()), length))
        below, length = length, 2 * length
    places = torch.empty_like(index)
    if len(groups) > 0:
        places[torch.cat([group.rows for group in groups])] = torch.arange(num_items, device=offsets.device)
    return groups, places


def softmax_attention(qkv: Tensor, offsets: Tensor, num_heads: int, span: int, dropout: float = 0.0) -> Tensor:
    """Attend causally inside every window of `window_offsets`.

    Args:
        qkv: queries, keys and values side by side, ``[T, 3*D]``.
        offsets: of the sequences, int64 ``[B + 1]``.
        num_heads: H, divides D.
        span: items of a window.
        dropout: rate on the attention weights.

    Returns:
        softmax(q kᵀ / sqrt(d)) v of each head, heads side by side, ``[T, D]``.
    """
    if torch.jit.is_scripting():
        return _attend(qkv, offsets, num_heads, span, dropout)
    seed = dropout_seed(qkv) if dropout > 0 else torch.zeros(0, dtype=torch.int64)
    return _forward(qkv.contiguous(), offsets, seed, num_heads, span, dropout)


def _groups(offsets: Tensor, num_items: int, span: int) -> tuple[list[PaddedGroup], Tensor]:
    """`padded_groups` of the windows of the sequences; outside TorchScript the latest are kept, as in `time_major`."""
    if torch.jit.is_scripting():
        return padded_groups(window_offsets(offsets, span), num_items)
    return _kept(tuple(offsets.tolist()), offsets.device, span)


@lru_cache(maxsize=4)
def _kept(offsets: tuple[int, ...], device: torch.device, span: int) -> tuple[list[PaddedGroup], Tensor]:
    return padded_groups(window_offsets(torch.tensor(offsets, device=device), span), offsets[-1])


def _to_heads(x: Tensor, group: PaddedGroup, num_heads: int) -> Tensor:
    """Bring columns of the items, ``[T, n*D]``, to padded ``[W, n*H, L, d]``; padding holds zeros."""
    padded = x.new_zeros([group.num_windows * group.length, x.size(1)])
    padded.index_copy_(0, group.slots, x.index_select(0, group.rows))
    return padded.view([group.num_windows, group.length, num_heads, x.size(1) // num_heads]).transpose(1, 2)


def _from_heads(x: Tensor, group: PaddedGroup) -> Tensor:
    """Bring ``[W, n*H, L, d]`` back to the items of the group."""
    flat = x.transpose(1, 2).reshape([group.num_windows * group.length, x.size(1) * x.size(3)])
    return flat.index_select(0, group.slots)


def _attend(qkv: Tensor, offsets: Tensor, num_heads: int, span: int, dropout: float) -> Tensor:
    """Forward pass by torch's own attention, whose dropout draws from the global generator."""
    groups, places = _groups(offsets, qkv.size(0), span)
    parts: list[Tensor] = [qkv[:0, : qkv.size(1) // 3]]
    for group in groups:
        q, k, v = _to_heads(qkv, group, 3 * num_heads).chunk(3, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        parts.append(_from_heads(out, group))
    return torch.cat(parts).index_select(0, places)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) over the items up to each one, ``[W, H, L, L]``."""
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(1 / math.sqrt(q.size(3)))
    later = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu_(1)
    return torch.softmax(scores.masked_fill_(later, -math.inf), dim=3)


def _scale(weights: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """0 for what is dropped, 1 / (1 - rate) for the rest."""
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


@torch.library.custom_op("glintru_rec::softmax_attention", mutates_args=())
def _forward(qkv: Tensor, offsets: Tensor, seed: Tensor, num_heads: int, span: int, dropout: float) -> Tensor:
    if dropout == 0:
        return _attend(qkv, offsets, num_heads, span, 0.0)
    groups, places = _groups(offsets, qkv.size(0), span)
    generator = torch.Generator(qkv.device).manual_seed(int(seed))  # the backward pass draws the same again
    parts = [qkv[:0, : qkv.size(1) // 3]]
    for group in groups:
        q, k, v = _to_heads(qkv, group, 3 * num_heads).chunk(3, dim=1)
        weights = _weights(q, k)
        parts.append(_from_heads(torch.matmul(weights.mul_(_scale(weights, dropout, generator)), v), group))
    return torch.cat(parts).index_select(0, places)


@torch.library.custom_op("glintru_rec::softmax_attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, offsets: Tensor, seed: Tensor, num_heads: int, span: int, dropout: float) -> Tensor:
    """With P the weights, M the dropout's scale and g the gradient: ∂v = (P M)ᵀ g;  ∂scores = P ⊗ (∂P - Σ P ⊗ ∂P)."""
    groups, places = _groups(offsets, qkv.size(0), span)
    generator = torch.Generator(qkv.device).manual_seed(int(seed)) if dropout > 0 else None
    parts = [qkv[:0]]
    for group in groups:
        q, k, v = _to_heads(qkv, group, 3 * num_heads).chunk(3, dim=1)
        g = _to_heads(grad, group, num_heads)
        weights = _weights(q, k)
        scale = _scale(weights, dropout, generator) if generator is not None else None
        grad_weights = torch.matmul(g, v.transpose(2, 3))
        if scale is not None:
            grad_weights.mul_(scale)
        grad_scores = grad_weights.sub_((weights * grad_weights).sum(3, keepdim=True)).mul_(weights)
        grad_scores.mul_(1 / math.sqrt(q.size(3)))
        grad_v = torch.matmul((weights if scale is None else weights.mul_(scale)).transpose(2, 3), g)
        grads = [torch.matmul(grad_scores, k), torch.matmul(grad_scores.transpose(2, 3), q), grad_v]
        parts.append(_from_heads(torch.cat(grads, dim=1), group))
    return torch.cat(parts).index_select(0, places)


@_forward.register_fake
def _(qkv, offsets, seed, num_heads, span, dropout):
    return qkv.new_empty(qkv.size(0), qkv.size(1) // 3)


@_backward.register_fake
def _(grad, qkv, offsets, seed, num_heads, span, dropout):
    return torch.empty_like(qkv)


def _setup(ctx, inputs, output) -> None:
    qkv, offsets, seed, *ctx.options = inputs
    ctx.save_for_backward(qkv, offsets, seed)


def _gradients(ctx, grad: Tensor):
    return _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
