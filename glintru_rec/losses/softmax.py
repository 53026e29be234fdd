"""Softmax cross-entropy of the next item, exact over the whole catalog.

Shapes: T targets, V catalog, D width, n items of one rank's share of the catalog, G targets of all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

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
            fp32, in the Triton kernels and on CPUs that can (AMX, AVX512_BF16); the aim's score and all else stay fp32.
        group: ranks that share the catalog, all of which call this and its backward pass at the same point of their
            programs; None: this rank alone.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`).

    Returns:
        One loss per target of this rank, ``[T]``.

    Raises:
        InputError: the implementation is not to be had.
    """
    query = query / temperature
    if group is None or group.size() == 1:
        log_sum = _LogSumExp.apply(query, items, precision, items.size(0) <= COLUMNS_AT_ONCE, implementation)
    else:
        log_sum = _log_sum_exp_across(query, items, precision, group, implementation)
    return log_sum - (query * aim).sum(1)


def _log_sum_exp_across(query: Tensor, items: Tensor, precision: str, group: dist.ProcessGroup, implementation: str) -> Tensor:
    """Compute log Σ_v exp(q_t · e_v) of this rank's queries over the items of all ranks: ``[T]``.

    The queries of all ranks visit this rank's items; each rank then gets back, from every rank, a sum for its own queries.
    """
    num_ranks, num_own = group.size(), query.size(0)
    sizes = [query.new_empty(1, dtype=torch.int64) for _ in range(num_ranks)]
    dist.all_gather(sizes, query.new_tensor([num_own], dtype=torch.int64), group=group)
    everyone, mine = [int(size) for size in sizes], [num_own] * num_ranks
    queries = _AllToAll.apply(query.repeat(num_ranks, 1), mine, everyone, group)  # [G, D]
    # What a part weighs in the whole is known only at the end, and differs from target to target: no gradients at once.
    parts = _AllToAll.apply(_LogSumExp.apply(queries, items, precision, False, implementation), everyone, mine, group)
    return parts.view(num_ranks, num_own).logsumexp(0)


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
    logits are computed again in the backward pass, as Triton kernels always do.
    """

    @staticmethod
    def forward(ctx, query: Tensor, items: Tensor, precision: str, at_once: bool, implementation: str):
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
            for rows, _, logits in _blocks(query, items, *size):
                largest = logits.amax(1, keepdim=True)
                total = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place: logsumexp would take a block of its own
                if at_once:
                    torch.mm(logits, items, out=expected_item[rows]).div_(total)
                    expected_query.addmm_(logits.t(), query[rows] / total)
                torch.logaddexp(log_sum[rows], (total.log_() + largest).squeeze(1), out=log_sum[rows])
        ctx.save_for_backward(query, items, log_sum, expected_item, expected_query)
        ctx.at_once, ctx.precision = at_once, precision
        return log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        if ctx.kernels is not None:
            return *ctx.kernels.backward(grads[0].contiguous(), *ctx.saved_tensors), None, None, None
        query, items, log_sum, expected_item, expected_query = ctx.saved_tensors
        weight = grads[0].unsqueeze(1)
        if ctx.at_once and bool((weight == weight[:1]).all()):
            return expected_item * weight, expected_query * weight[:1].sum(), None, None, None
        grad_query, grad_items, weighted = torch.zeros_like(query), torch.zeros_like(items), query * weight
        with _cpu_matmuls(ctx.precision):
            for rows, columns, logits in _blocks(query, items, ROWS, COLUMNS):
                softmax = logits.sub_(log_sum[rows].unsqueeze(1)).exp_()
                grad_query[rows].addmm_(softmax, items[columns])
                grad_items[columns].addmm_(softmax.t(), weighted[rows])
        return grad_query.mul_(weight), grad_items, None, None, None


def _blocks(query: Tensor, items: Tensor, most_rows: int, most_columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield slices of the targets and of the catalog that together cover all logits, and these; one buffer serves all."""
    num_targets, num_items = query.size(0), items.size(0)
    buffer = query.new_empty(min(most_rows, num_targets) * min(most_columns, num_items))
    for row in range(0, num_targets, most_rows):
        for column in range(0, num_items, most_columns):
            rows, columns = slice(row, row + most_rows), slice(column, column + most_columns)
            few, block = query[rows], items[columns]
            logits = buffer[: few.size(0) * block.size(0)].view(few.size(0), block.size(0))
            yield rows, columns, torch.mm(few, block.t(), out=logits)


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
