"""Ragged linear attention on a GPU: the kernels of `glintru_rec.ops.linear_attention`, ``a_n = q_nᵀ (S_0 + Σ_m k_m v_mᵀ)``.

A program takes one head of one sequence, a chunk of items after the other, with the sum S of the chunks before in registers,
in fp32. Causal: within a chunk by the masked ``q kᵀ v``, between chunks by S. The backward pass saves nothing: it walks
the chunks forward again for ``∂q`` (which needs S), and then from the end for ``∂k`` and ``∂v``, which need

    R_n = ∂S_N + Σ_{m ≥ n} q_m ∂a_mᵀ,    ∂k_n = R_n v_n,    ∂v_n = R_nᵀ k_n,    ∂S_0 = R_1.

Shapes: T items, B sequences, H heads, d features of a head's keys and e of its values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.ops.triton_common import block, ends, factors, fits, load_rows, product, refuse, store_rows, within

WIDEST = 128


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take queries ``[T, H, d]`` and values ``[T, H, e]`` of such dtype and widths."""
    return fits(q, max(q.size(2), v.size(2)), WIDEST)


def forward(q: Tensor, k: Tensor, v: Tensor, initial: Tensor, offsets: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend over every sequence of a ragged batch. All tensors are contiguous and of one dtype.

    Args:
        q: queries, ``[T, H, d]``.
        k: keys, ``[T, H, d]``.
        v: values, ``[T, H, e]``.
        initial: S_0 of each sequence, ``[B, H, d, e]``.
        offsets: int64 ``[B + 1]``, from 0 to T.
        causal: position n attends to items ``1 .. n``; otherwise to all items of its sequence.

    Returns:
        ``[T, H, e]``, and S_0 + Σ k vᵀ over each whole sequence, ``[B, H, d, e]``.

    Raises:
        InputError: a dtype or a width that the kernels do not take.
    """
    refuse("linear_attention", q, max(q.size(2), v.size(2)), WIDEST)
    out, last = torch.empty_like(v), torch.empty_like(initial)
    if initial.numel() > 0:
        _forward[initial.shape[:2]](q, k, v, initial, offsets, out, last, **_shape(q, v, causal))
    return out, last


def backward(
    grad_out: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, v: Tensor, initial: Tensor, offsets: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_out: gradient of the result, ``[T, H, e]``.
        grad_last: gradient of the last sums, ``[B, H, d, e]``.
        q: as given to `forward`.
        k: likewise.
        v: likewise.
        initial: likewise.
        offsets: likewise.
        causal: likewise.

    Returns:
        Gradients of ``q``, ``k``, ``v`` and ``initial``.
    """
    grad_q, grad_k, grad_v, grad_initial = map(torch.empty_like, (q, k, v, initial))
    if initial.numel() > 0:
        incoming = (grad_out, grad_last, q, k, v, initial, offsets)
        _backward[initial.shape[:2]](*incoming, grad_q, grad_k, grad_v, grad_initial, **_shape(q, v, causal))
    return grad_q, grad_k, grad_v, grad_initial


def _shape(q: Tensor, v: Tensor, causal: bool) -> dict:
    """Choose the tiles."""
    keys, values = block(q.size(2)), block(v.size(2))
    return {
        "HEADS": q.size(1),
        "D": q.size(2),
        "E": v.size(2),
        "KEYS": keys,
        "VALUES": values,
        "CHUNK": 32 if q.dtype == torch.bfloat16 else 16,  # items that meet by a masked product
        "CAUSAL": causal,
        "FACTORS": factors(q.dtype),
        "num_warps": 8 if keys * values * q.element_size() > 64 * 64 * 2 else 4,
        "num_stages": 1,
    }


@triton.jit
def _load(pointer, row, head, features, end, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Read one head of some items in fp32, zeros past the sequence's end and the head's width."""
    return load_rows(pointer + head * WIDTH, row, features, within(row, end, features, WIDTH), HEADS * WIDTH)


@triton.jit
def _store(pointer, row, head, features, end, x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    store_rows(pointer + head * WIDTH, row, features, x, within(row, end, features, WIDTH), HEADS * WIDTH)


@triton.jit
def _place(offsets, HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """Give the program's head, the ends of its sequence, its features, and where its sum is kept."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = ends(offsets, sequence)
    d, e = tl.arange(0, KEYS), tl.arange(0, VALUES)
    at = (sequence * HEADS + head) * D * E + d[:, None] * E + e[None, :]
    return head, start, end, d, e, at, within(d, D, e, E)


@triton.jit
def _forward(
    q_pointer,
    k_pointer,
    v_pointer,
    initial,
    offsets,
    out,
    last,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    head, start, end, d, e, at, inside = _place(offsets, HEADS, D, E, KEYS, VALUES)
    items = tl.arange(0, CHUNK)
    sums = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    if not CAUSAL:
        for first in range(start, end, CHUNK):
            k = _load(k_pointer, first + items, head, d, end, HEADS, D)
            v = _load(v_pointer, first + items, head, e, end, HEADS, E)
            sums += product(tl.trans(k), v, FACTORS)
    for first in range(start, end, CHUNK):
        row = first + items
        q = _load(q_pointer, row, head, d, end, HEADS, D)
        a = product(q, sums, FACTORS)
        if CAUSAL:
            k = _load(k_pointer, row, head, d, end, HEADS, D)
            v = _load(v_pointer, row, head, e, end, HEADS, E)
            weights = tl.where(items[:, None] >= items[None, :], product(q, tl.trans(k), FACTORS), 0.0)
            a += product(weights, v, FACTORS)
            sums += product(tl.trans(k), v, FACTORS)
        _store(out, row, head, e, end, a, HEADS, E)
    tl.store(last + at, sums, mask=inside)


@triton.jit
def _backward(
    grad_out,
    grad_last,
    q_pointer,
    k_pointer,
    v_pointer,
    initial,
    offsets,
    grad_q,
    grad_k,
    grad_v,
    grad_initial,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    head, start, end, d, e, at, inside = _place(offsets, HEADS, D, E, KEYS, VALUES)
    items = tl.arange(0, CHUNK)
    causal = items[:, None] >= items[None, :]
    sums = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    later = tl.load(grad_last + at, mask=inside, other=0.0).to(tl.float32)
    if not CAUSAL:
        for first in range(start, end, CHUNK):
            row = first + items
            k = _load(k_pointer, row, head, d, end, HEADS, D)
            v = _load(v_pointer, row, head, e, end, HEADS, E)
            sums += product(tl.trans(k), v, FACTORS)
            q = _load(q_pointer, row, head, d, end, HEADS, D)
            da = _load(grad_out, row, head, e, end, HEADS, E)
            later += product(tl.trans(q), da, FACTORS)
    for first in range(start, end, CHUNK):
        row = first + items
        da = _load(grad_out, row, head, e, end, HEADS, E)
        dq = product(da, tl.trans(sums), FACTORS)
        if CAUSAL:
            k = _load(k_pointer, row, head, d, end, HEADS, D)
            v = _load(v_pointer, row, head, e, end, HEADS, E)
            dq += product(tl.where(causal, product(da, tl.trans(v), FACTORS), 0.0), k, FACTORS)
            sums += product(tl.trans(k), v, FACTORS)
        _store(grad_q, row, head, d, end, dq, HEADS, D)
    num_chunks = tl.cdiv(end - start, CHUNK)
    for back in range(num_chunks):
        row = start + (num_chunks - 1 - back) * CHUNK + items
        k = _load(k_pointer, row, head, d, end, HEADS, D)
        v = _load(v_pointer, row, head, e, end, HEADS, E)
        dk = product(v, tl.trans(later), FACTORS)
        dv = product(k, later, FACTORS)
        if CAUSAL:
            q = _load(q_pointer, row, head, d, end, HEADS, D)
            da = _load(grad_out, row, head, e, end, HEADS, E)
            dk += product(tl.trans(tl.where(causal, product(da, tl.trans(v), FACTORS), 0.0)), q, FACTORS)
            dv += product(tl.trans(tl.where(causal, product(q, tl.trans(k), FACTORS), 0.0)), da, FACTORS)
            later += product(tl.trans(q), da, FACTORS)
        _store(grad_k, row, head, d, end, dk, HEADS, D)
        _store(grad_v, row, head, e, end, dv, HEADS, E)
    tl.store(grad_initial + at, later, mask=inside)
