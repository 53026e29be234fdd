"""Softmax cross-entropy of the next item, exact over the whole catalog.

Shapes: T targets, V catalog, D width, n items of one rank's share of the catalog, G targets of all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.losses.seen import Seen
from glintru_rec.ops.implementation import triton_kernels

# Logits held at one time by the exact softmax: ROWS x COLUMNS floats, whatever T and V are. So small a block is read again
# while a CPU's cache still holds it.
ROWS, COLUMNS = 256, 1024
# A catalog of few items has whole rows of logits in a block, and so both gradients while it is there.
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 128, 16384
PRECISIONS = ("fp32", "bf16")


def full_softmax(
    query: Tensor,
    aim: Tensor,
    items: Tensor,
    temperature: float = 1.0,
    precision: str = "fp32",
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    seen: Seen | None = None,
    first_item: int = 0,
) -> Tensor:
    """Softmax cross-entropy over the whole catalog, block by block: the ``[T, V]`` logits never exist at once.

        loss = -s⁺ + log Σ_v exp(s_v),   s = query · item / temperature

    Ranks may share the catalog: the queries of all visit the items of each, so none holds more than its own. ``items`` then get
    the gradient of all ranks' losses, ``query`` and ``aim`` of their own rank's: divided by the number of ranks, as TorchRec's
    tables and DDP do, all are gradients of the mean over ranks.

    Args:
        query: ``[T, D]``; T may differ from rank to rank, and be 0.
        aim: vector whose score is s⁺, ``[T, D]``: the target's, or the mean of several targets' (their mean loss). It need
            not be among this rank's items.
        items: embedding of every item, ``[V, D]``; with a group of several ranks of this rank's items alone, ``[n, D]``:
            each item on one rank, n may differ and be 0.
        temperature: divides the scores.
        precision: ``bf16`` rounds the factors of the logits' products, and of their gradients', to bfloat16 and sums in
            fp32, in the Triton kernels and on CPUs with AMX; the aim's score, all else and other CPUs stay fp32.
        group: ranks that share the catalog, all of which call this and its backward pass at the same point of their
            programs; None: this rank alone.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`); torch code with ``seen``.
        seen: items that weigh less in a target's sum, or nothing (`seen_before`); None: none. Given by all ranks or none.
        first_item: id of the first of ``items``, for ``seen``.

    Returns:
        One loss per target of this rank, ``[T]``.

    Raises:
        InputError: the implementation is not to be had.
    """
    query = query / temperature
    if seen is not None:
        if implementation == "triton":
            raise InputError("full_softmax: implementation is 'triton', whose kernels weigh all items alike, and seen is given")
        implementation = "torch"
    if group is None or group.size() == 1:
        at_once = items.size(0) <= COLUMNS_AT_ONCE
        log_sum = _LogSumExp.apply(query, items, precision, at_once, implementation, seen, first_item)
    else:
        log_sum = _log_sum_exp_across(query, items, precision, group, implementation, seen, first_item)
    return log_sum - (query * aim).sum(1)


def _log_sum_exp_across(
    query: Tensor,
    items: Tensor,
    precision: str,
    group: dist.ProcessGroup,
    implementation: str,
    seen: Seen | None,
    first_item: int,
) -> Tensor:
    """Compute log Σ_v exp(q_t · e_v) of this rank's queries over the items of all ranks: ``[T]``.

    The queries of all ranks visit this rank's items; each rank then gets back, from every rank, a sum for its own queries.
    """
    queries, everyone = _of_all_ranks(query, group)  # [G, D]
    mine = [query.size(0)] * group.size()
    if seen is not None:
        seen = _seen_on_all_ranks(seen, everyone, group)
    # What a part weighs in the whole is known only at the end, and differs from target to target: no gradients at once.
    sums = _LogSumExp.apply(queries, items, precision, False, implementation, seen, first_item)
    parts = _AllToAll.apply(sums, everyone, mine, group)
    return parts.view(group.size(), query.size(0)).logsumexp(0)


def _of_all_ranks(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[int]]:
    """Bring the rows of all ranks together, with their gradients' way back, and say how many each rank has."""
    sizes = [rows.new_empty(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, rows.new_tensor([rows.size(0)], dtype=torch.int64), group=group)
    counts = [int(size) for size in sizes]
    copies = rows.repeat(group.size(), *[1] * (rows.dim() - 1))
    return _AllToAll.apply(copies, [rows.size(0)] * group.size(), counts, group), counts


def _seen_on_all_ranks(seen: Seen, targets: list[int], group: dist.ProcessGroup) -> Seen:
    """Join what the targets of all ranks have seen, ``targets`` of each."""
    item_ids, counts = _of_all_ranks(seen.item_ids, group)
    begins, ends, aims = (_of_all_ranks(part, group)[0] for part in seen[1:4])
    before = torch.tensor([0, *counts[:-1]], device=begins.device).cumsum(0)
    shift = torch.repeat_interleave(before, torch.tensor(targets, device=begins.device))
    return Seen(item_ids, begins + shift, ends + shift, aims, seen.log_weight)


class _AllToAll(torch.autograd.Function):
    """Send each rank its part of the rows, receive one from each; gradients go back where the rows came from."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty([sum(receive), *rows.shape[1:]])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _AllToAll.apply(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


class _LogSumExp(torch.autograd.Function):
    """l_t = log Σ_v exp(q_t · e_v).

    With p_tv = exp(q_t · e_v - l_t)::

        ∂l_t/∂q_t = Σ_v p_tv e_v        ∂ Σ_t l_t / ∂e_v = Σ_t p_tv q_t

    ``at_once``, where a row of logits fits into one block: both sums are taken while the block is there, as for losses that
    weigh the same; that is a matmul and an exponential fewer. Otherwise, and where losses turn out to weigh differently, the
    logits are computed again in the backward pass, as Triton kernels always do. Where all that a rank has is seen, and weighs
    nothing, its l_t is -∞ and gradients are 0.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        items: Tensor,
        precision: str,
        at_once: bool,
        implementation: str,
        seen: Seen | None,
        first_item: int,
    ):
        dtype = torch.bfloat16 if precision == "bf16" else query.dtype  # of the kernels' factors; they sum in fp32
        ctx.kernels = triton_kernels("softmax", implementation, query[:0].to(dtype))
        if ctx.kernels is not None:
            query, items = query.to(dtype).contiguous(), items.to(dtype).contiguous()
            log_sum = ctx.kernels.forward(query, items)
            ctx.save_for_backward(query, items, log_sum)
            return log_sum
        at_once = at_once and any(ctx.needs_input_grad)
        log_sum = query.new_full((query.size(0),), -torch.inf)
        expected_item = torch.empty_like(query) if at_once else query[:0]  # Σ_v p_tv e_v
        expected_query = torch.zeros_like(items) if at_once else items[:0]  # Σ_t p_tv q_t
        size = (ROWS_AT_ONCE, COLUMNS_AT_ONCE) if at_once else (ROWS, COLUMNS)
        with _cpu_matmuls(precision):
            for rows, _, logits in _blocks(query, items, *size, seen, first_item):
                largest = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
                total = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place: logsumexp would take a block of its own
                if at_once:
                    torch.mm(logits, items, out=expected_item[rows]).div_(total)
                    expected_query.addmm_(logits.t(), query[rows] / total)
                torch.logaddexp(log_sum[rows], (total.log_() + largest).squeeze(1), out=log_sum[rows])
        ctx.save_for_backward(query, items, log_sum, expected_item, expected_query)
        ctx.at_once, ctx.precision, ctx.seen, ctx.first_item = at_once, precision, seen, first_item
        return log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        if ctx.kernels is not None:
            return *ctx.kernels.backward(grads[0].contiguous(), *ctx.saved_tensors), None, None, None, None, None
        query, items, log_sum, expected_item, expected_query = ctx.saved_tensors
        weight = grads[0].unsqueeze(1)
        if ctx.at_once and bool((weight == weight[:1]).all()):
            return expected_item * weight, expected_query * weight[:1].sum(), None, None, None, None, None
        grad_query, grad_items, weighted = torch.zeros_like(query), torch.zeros_like(items), query * weight
        log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
        with _cpu_matmuls(ctx.precision):
            for rows, columns, logits in _blocks(query, items, ROWS, COLUMNS, ctx.seen, ctx.first_item):
                softmax = logits.sub_(log_sum[rows].unsqueeze(1)).exp_()
                grad_query[rows].addmm_(softmax, items[columns])
                grad_items[columns].addmm_(softmax.t(), weighted[rows])
        return grad_query.mul_(weight), grad_items, None, None, None, None, None


def _blocks(
    query: Tensor, items: Tensor, most_rows: int, most_columns: int, seen: Seen | None, first_item: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield slices of the targets and of the catalog that together cover all logits, and these; one buffer serves all."""
    num_targets, num_items = query.size(0), items.size(0)
    buffer = query.new_empty(min(most_rows, num_targets) * min(most_columns, num_items))
    for row in range(0, num_targets, most_rows):
        rows = slice(row, row + most_rows)
        pairs = None if seen is None else _in_blocks(seen, rows, first_item, num_items, most_columns)
        for column in range(0, num_items, most_columns):
            columns = slice(column, column + most_columns)
            few, block = query[rows], items[columns]
            logits = buffer[: few.size(0) * block.size(0)].view(few.size(0), block.size(0))
            torch.mm(few, block.t(), out=logits)
            if seen is not None and pairs is not None:
                logits[pairs[column // most_columns]] += seen.log_weight  # once, however often it was seen
            yield rows, columns, logits


def _in_blocks(seen: Seen, rows: slice, first_item: int, num_items: int, most_columns: int) -> list[tuple[Tensor, Tensor]]:
    """Give what the targets of a block of rows have seen, by blocks of columns: target and column, counted in the block."""
    target, item_ids = seen.pairs(rows)
    column = item_ids - first_item
    inside = (column >= 0) & (column < num_items)
    if not inside.all():
        target, column = target[inside], column[inside]
    num_blocks = -(-num_items // most_columns)
    if num_blocks <= 1:
        return [(target, column)]
    column, order = column.sort()
    begins = torch.arange(1, num_blocks, device=column.device) * most_columns
    parts = (part.tensor_split(torch.searchsorted(column, begins).cpu()) for part in (target[order], column % most_columns))
    return list(zip(*parts))


@contextmanager
def _cpu_matmuls(precision: str) -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices in ``precision`` for a while."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if precision == "bf16":
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
