"""Softmax cross-entropy of the next item: sampled, and exact over the whole catalog.

Shapes: T targets, K negatives, V catalog, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Logits held at one time by the exact softmax: ROWS x COLUMNS floats, whatever T and V are. A block of few rows is read
# again while a CPU's cache still holds it.
ROWS, COLUMNS = 256, 16384
PRECISIONS = ("fp32", "bf16")


def sampled_softmax(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    target_ids: Tensor,
    negative_ids: Tensor,
    log_q: Tensor | float | None,
    temperature: float = 1.0,
    aim: Tensor | None = None,
    positive_log_q: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy against a sample of the catalog.

        loss = -s_aim + log( exp(s⁺) + Σ_j exp(s_j - log_q_j) ),   s = query · item / temperature

    With ``log_q_j`` the log of how often item j is expected in the sample, the sum is an unbiased estimate of the
    sum over all other items that can be drawn: the positive was not sampled and is not corrected (arXiv 2507.09331).
    With the whole catalog as negatives and ``log_q = 0`` the loss is the exact softmax. A negative that is the target
    itself (an accidental hit) is masked.

    Args:
        query: ``[T, D]``.
        positive: embedding of each target, ``[T, D]``.
        negatives: embeddings of the shared negatives, ``[K, D]``.
        target_ids: int64 ``[T]``.
        negative_ids: int64 ``[K]``.
        log_q: log of the expected count of each negative in the sample, ``[K]`` or one for all; None: no correction.
        temperature: divides the scores.
        aim: vector whose score is s_aim, ``[T, D]``: the mean of several targets' embeddings; ``positive`` when absent.
        positive_log_q: log of the expected count of each target in the sample, ``[T]``: subtracted from s⁺ and s_aim, as in
            the classic correction, which treats the positive as one of the sample; None: it is not corrected.

    Returns:
        One loss per target, ``[T]``; float32 where the inputs are narrower.
    """
    query = query / temperature
    wide = torch.promote_types(query.dtype, torch.float32)
    positive_score = (query * positive).to(wide).sum(1, keepdim=True)
    aim_score = positive_score if aim is None else (query * aim).to(wide).sum(1, keepdim=True)
    if positive_log_q is not None:
        correction = positive_log_q.unsqueeze(1)
        positive_score, aim_score = positive_score - correction, aim_score - correction
    negative_score = (query @ negatives.t()).to(wide)
    if log_q is not None:
        negative_score = negative_score - log_q
    accidental_hits = target_ids.unsqueeze(1) == negative_ids
    negative_score = negative_score.masked_fill(accidental_hits, -torch.inf)
    scores = torch.cat([positive_score, negative_score], dim=1)
    return torch.logsumexp(scores, dim=1) - aim_score.squeeze(1)


def full_softmax(query: Tensor, aim: Tensor, items: Tensor, temperature: float = 1.0, precision: str = "fp32") -> Tensor:
    """Softmax cross-entropy over the whole catalog, block by block: the ``[T, V]`` logits never exist at once.

        loss = -s⁺ + log Σ_v exp(s_v),   s = query · item / temperature

    Args:
        query: ``[T, D]``.
        aim: vector whose score is s⁺, ``[T, D]``: the target's, or the mean of several targets' (their mean loss).
        items: embedding of every item, ``[V, D]``.
        temperature: divides the scores.
        precision: ``bf16`` rounds the factors of the logits' products, and of their gradients', to bfloat16 and sums in
            fp32, on CPUs that can (AMX, AVX512_BF16); the aim's score and all else stay fp32.

    Returns:
        One loss per target, ``[T]``.
    """
    query = query / temperature
    return _LogSumExp.apply(query, items, precision) - (query * aim).sum(1)


class _LogSumExp(torch.autograd.Function):
    """l_t = log Σ_v exp(q_t · e_v).

    With p_tv = exp(q_t · e_v - l_t)::

        ∂l_t/∂q_t = Σ_v p_tv e_v        ∂ Σ_t l_t / ∂e_v = Σ_t p_tv q_t

    Where a row of logits fits into one block, both sums are taken while the block is there, as for losses that weigh the
    same; that is a matmul and an exponential fewer. Otherwise, and where losses turn out to weigh differently, the logits
    are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, query: Tensor, items: Tensor, precision: str):
        log_sum = query.new_full((query.size(0),), -torch.inf)
        at_once = items.size(0) <= COLUMNS and any(ctx.needs_input_grad)
        expected_item = torch.empty_like(query) if at_once else query[:0]  # Σ_v p_tv e_v
        expected_query = torch.zeros_like(items) if at_once else items[:0]  # Σ_t p_tv q_t
        with _cpu_matmuls(precision):
            for rows, _, logits in _blocks(query, items):
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
        query, items, log_sum, expected_item, expected_query = ctx.saved_tensors
        weight = grads[0].unsqueeze(1)
        if ctx.at_once and bool((weight == weight[:1]).all()):
            return expected_item * weight, expected_query * weight[:1].sum(), None
        grad_query, grad_items = torch.zeros_like(query), torch.zeros_like(items)
        with _cpu_matmuls(ctx.precision):
            for rows, columns, logits in _blocks(query, items):
                softmax = logits.sub_(log_sum[rows].unsqueeze(1)).exp_().mul_(weight[rows])
                grad_query[rows].addmm_(softmax, items[columns])
                grad_items[columns].addmm_(softmax.t(), query[rows])
        return grad_query, grad_items, None


def _blocks(query: Tensor, items: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield slices of the targets and of the catalog that together cover all logits, and these; one buffer serves all."""
    num_targets, num_items = query.size(0), items.size(0)
    buffer = query.new_empty(min(ROWS, num_targets) * min(COLUMNS, num_items))
    for row in range(0, num_targets, ROWS):
        for column in range(0, num_items, COLUMNS):
            rows, columns = slice(row, row + ROWS), slice(column, column + COLUMNS)
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
