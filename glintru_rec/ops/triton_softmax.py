"""Log-sum-exp of scores on a GPU, block by block: the ``[T, V]`` scores never exist.

    l_t = log Σ_v exp(q_t · e_v - c_v)  over all v,  or over those whose id is not the target's

Exact softmax over a catalog is ``l_t - q_t · e_target`` with c = 0; for a sampled one v runs over the negatives, c is their
log_q, and the target's own score joins by a ``logaddexp``. The backward pass computes the scores again. With p = exp(s - l)::

    ∂q_t = g_t Σ_v p_tv e_v        ∂e_v = Σ_t g_t p_tv q_t

A program takes a tile of targets and a range of items (or the other way round, for ∂e); where there are too few tiles to fill a
GPU the range is cut into parts, and their results are joined by torch, in one order.

`glintru_rec.losses.full_softmax` and `sampled_softmax` are what uses these kernels.

Shapes: T targets, V items, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.ops.triton_common import block, factors, fits, load_rows, product, refuse, store_rows, within

PROGRAMS = 264  # that fill a GPU: two on each of the 132 multiprocessors of an H100 or H200
WIDEST = 256


def takes(query: Tensor) -> bool:
    """Whether the kernels take queries ``[T, D]`` of such dtype and width."""
    return fits(query, query.size(1), WIDEST)


def forward(
    query: Tensor, items: Tensor, log_q: Tensor | None = None, target_ids: Tensor | None = None, item_ids: Tensor | None = None
) -> Tensor:
    """Give the log-sum-exp of every target's scores. All tensors are contiguous, ``query`` and ``items`` of one dtype.

    Args:
        query: ``[T, D]``.
        items: ``[V, D]``.
        log_q: subtracted from each item's scores, float32 ``[V]``; without gradient.
        target_ids: int64 ``[T]``; given with ``item_ids``.
        item_ids: int64 ``[V]``: an item is left out of the sums of those targets that have its id.

    Returns:
        float32 ``[T]``; minus infinity where no item is left.

    Raises:
        InputError: a dtype or a width that the kernels do not take.
    """
    refuse("log_sum_exp", query, query.size(1), WIDEST)
    num_targets, num_items = query.size(0), items.size(0)
    shape = _shape(query, log_q, target_ids, narrow_rows=False)
    rows, columns = shape["ROWS"], shape["COLUMNS"]
    parts = _parts(num_targets, rows, num_items, columns)
    log_sums = torch.empty(parts, num_targets, dtype=torch.float32, device=query.device)
    if num_targets > 0:
        grid = (triton.cdiv(num_targets, rows), parts)
        arguments = (query, items, log_q, target_ids, item_ids, log_sums, num_targets, num_items)
        _forward[grid](*arguments, **shape)
    return log_sums.logsumexp(0)


def backward(
    grad: Tensor,
    query: Tensor,
    items: Tensor,
    log_sum: Tensor,
    log_q: Tensor | None = None,
    target_ids: Tensor | None = None,
    item_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of ``query`` and ``items``.

    Args:
        grad: gradient of the result, float32 ``[T]``.
        query: as given to `forward`.
        items: likewise.
        log_sum: what it gave, ``[T]``.
        log_q: as given to `forward`.
        target_ids: likewise.
        item_ids: likewise.
    """
    num_targets, num_items = query.size(0), items.size(0)
    shape = _shape(query, log_q, target_ids, narrow_rows=True)
    rows, columns = shape["ROWS"], shape["COLUMNS"]
    arguments = (grad, query, items, log_sum, log_q, target_ids, item_ids)
    gradients = []
    for kernel, own, tile, other, other_tile in (
        (_backward_query, query, rows, items, columns),
        (_backward_items, items, columns, query, rows),
    ):
        parts = _parts(own.size(0), tile, other.size(0), other_tile)
        shares = torch.empty(parts, *own.shape, dtype=torch.float32, device=own.device)
        if own.size(0) > 0:
            kernel[(triton.cdiv(own.size(0), tile), parts)](*arguments, shares, num_targets, num_items, **shape)
        gradients.append((shares[0] if parts == 1 else shares.sum(0)).to(own.dtype))
    return gradients[0], gradients[1]


def _parts(size: int, tile: int, other_size: int, other_tile: int) -> int:
    """Cut the other dimension where this one's tiles are too few to fill a GPU."""
    tiles = max(1, triton.cdiv(size, tile))
    return max(1, min(PROGRAMS // tiles, triton.cdiv(other_size, 4 * other_tile)))


def _shape(query: Tensor, log_q: Tensor | None, target_ids: Tensor | None, narrow_rows: bool) -> dict:
    """Choose the tiles: smaller ones in fp32, and again in its backward pass, so that nothing spills."""
    width, wide = block(query.size(1)), query.dtype == torch.float32
    return {
        "D": query.size(1),
        "WIDTH": width,
        "ROWS": 32 if wide and narrow_rows else 64,
        "COLUMNS": 32 if wide else 64,
        "CORRECTED": log_q is not None,
        "MASKED": target_ids is not None,
        "FACTORS": factors(query.dtype),
        "num_warps": 8 if wide or width > 128 else 4,
        "num_stages": 1 if wide or width > 128 else 2,
    }


@triton.jit
def _load(pointer, row, features, size, D: tl.constexpr):
    """Read rows in fp32, zeros outside."""
    return load_rows(pointer, row, features, within(row, size, features, D), D)


@triton.jit
def _scores(
    q,
    e,
    row,
    column,
    log_q,
    target_ids,
    item_ids,
    num_targets,
    num_items,
    CORRECTED: tl.constexpr,
    MASKED: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Give a tile of scores, minus infinity where there is none."""
    s = product(q, tl.trans(e), FACTORS)
    if CORRECTED:
        s -= tl.load(log_q + column, mask=column < num_items, other=0.0)[None, :]
    counted = (column < num_items)[None, :]
    if MASKED:
        target = tl.load(target_ids + row, mask=row < num_targets, other=0)
        item = tl.load(item_ids + column, mask=column < num_items, other=0)
        counted = counted & (target[:, None] != item[None, :])
    return tl.where(counted, s, -float("inf"))


@triton.jit
def _softmax(s, log_sum, grad):
    """Give g_t p_tv. A target without items has no gradient."""
    p = tl.exp(s - tl.where(log_sum == -float("inf"), 0.0, log_sum)[:, None])
    return p * grad[:, None]


@triton.jit
def _range(size, TILE: tl.constexpr):
    """Give the program's part of the other dimension, in whole tiles."""
    tiles = tl.cdiv(tl.cdiv(size, TILE), tl.num_programs(1))
    first = tl.program_id(1) * tiles * TILE
    return first, min(first + tiles * TILE, size)


@triton.jit
def _forward(
    query,
    items,
    log_q,
    target_ids,
    item_ids,
    log_sums,
    num_targets,
    num_items,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CORRECTED: tl.constexpr,
    MASKED: tl.constexpr,
    FACTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, WIDTH)
    q = _load(query, row, features, num_targets, D)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first, end = _range(num_items, COLUMNS)
    for begin in range(first, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        e = _load(items, column, features, num_items, D)
        s = _scores(q, e, row, column, log_q, target_ids, item_ids, num_targets, num_items, CORRECTED, MASKED, FACTORS)
        raised = tl.maximum(largest, tl.max(s, 1))
        finite = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
        largest = raised
    log_sum = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(log_sums + tl.program_id(1).to(tl.int64) * num_targets + row, log_sum, mask=row < num_targets)


@triton.jit
def _backward_query(
    grad,
    query,
    items,
    log_sum,
    log_q,
    target_ids,
    item_ids,
    shares,
    num_targets,
    num_items,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CORRECTED: tl.constexpr,
    MASKED: tl.constexpr,
    FACTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, WIDTH)
    q = _load(query, row, features, num_targets, D)
    g = tl.load(grad + row, mask=row < num_targets, other=0.0)
    log_total = tl.load(log_sum + row, mask=row < num_targets, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    first, end = _range(num_items, COLUMNS)
    for begin in range(first, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        e = _load(items, column, features, num_items, D)
        s = _scores(q, e, row, column, log_q, target_ids, item_ids, num_targets, num_items, CORRECTED, MASKED, FACTORS)
        dq += product(_softmax(s, log_total, g), e, FACTORS)
    store_rows(
        shares + tl.program_id(1).to(tl.int64) * num_targets * D, row, features, dq, within(row, num_targets, features, D), D
    )


@triton.jit
def _backward_items(
    grad,
    query,
    items,
    log_sum,
    log_q,
    target_ids,
    item_ids,
    shares,
    num_targets,
    num_items,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CORRECTED: tl.constexpr,
    MASKED: tl.constexpr,
    FACTORS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    features = tl.arange(0, WIDTH)
    e = _load(items, column, features, num_items, D)
    de = tl.zeros([COLUMNS, WIDTH], tl.float32)
    first, end = _range(num_targets, ROWS)
    for begin in range(first, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        q = _load(query, row, features, num_targets, D)
        g = tl.load(grad + row, mask=row < num_targets, other=0.0)
        log_total = tl.load(log_sum + row, mask=row < num_targets, other=0.0)
        s = _scores(q, e, row, column, log_q, target_ids, item_ids, num_targets, num_items, CORRECTED, MASKED, FACTORS)
        de += product(tl.trans(_softmax(s, log_total, g)), q, FACTORS)
    store_rows(
        shares + tl.program_id(1).to(tl.int64) * num_items * D, column, features, de, within(column, num_items, features, D), D
    )
