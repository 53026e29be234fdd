"""Softmax cross-entropy of the next item against a sample of the catalog.

Shapes: T targets, K negatives, D width.
"""

import math

import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.ops.implementation import triton_kernels


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
    implementation: str = "auto",
    seen_places: Tensor | None = None,
    seen_log_weight: float = -math.inf,
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
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`): with Triton's kernels the
            ``[T, K]`` scores never exist. Torch code with ``seen_places``.
        seen_places: which of the scores ``[T, K]``, row by row, are of an item that the user has seen: int64 ``[P]``
            (`Seen.places`); None: none.
        seen_log_weight: log of what these weigh in the sum; minus infinity masks them.

    Returns:
        One loss per target, ``[T]``; float32 where the inputs are narrower.

    Raises:
        InputError: the implementation is not to be had.
    """
    query = query / temperature
    wide = torch.promote_types(query.dtype, torch.float32)
    positive_score = (query * positive).to(wide).sum(1)
    aim_score = positive_score if aim is None else (query * aim).to(wide).sum(1)
    if positive_log_q is not None:
        positive_score, aim_score = positive_score - positive_log_q, aim_score - positive_log_q
    if not isinstance(log_q, Tensor):
        log_q = torch.full_like(negative_ids, log_q or 0.0, dtype=wide)
    if seen_places is not None:
        if implementation == "triton":
            raise InputError("sampled_softmax: implementation is 'triton', whose kernels know no seen_places")
        implementation = "torch"
    save = torch.is_grad_enabled() and (query.requires_grad or negatives.requires_grad)
    corrected = query.contiguous(), negatives.contiguous(), log_q.to(wide), target_ids, negative_ids
    log_sum, _ = _forward(*corrected, seen_places, seen_log_weight, save, implementation)
    return torch.logaddexp(positive_score, log_sum) - aim_score


@torch.library.custom_op("glintru_rec::negatives_forward", mutates_args=())
def _forward(
    query: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    target_ids: Tensor,
    negative_ids: Tensor,
    seen_places: Tensor | None,
    seen_log_weight: float,
    save: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Give log Σ_j exp(q_t · e_j - log_q_j) over the negatives that are not the target, ``[T]``, and scores to keep."""
    kernels = triton_kernels("softmax", implementation, query)
    if kernels is not None:
        return kernels.forward(query, negatives, log_q, target_ids, negative_ids), log_q.new_empty(0, log_q.numel())
    scores = torch.mm(query, negatives.t()).to(log_q.dtype).sub_(log_q)
    scores.masked_fill_(target_ids.unsqueeze(1) == negative_ids, -torch.inf)
    if seen_places is not None:
        scores.view(-1)[seen_places] += seen_log_weight  # once, however often it was seen
    return scores.logsumexp(1), scores if save else scores[:0].clone()


@torch.library.custom_op("glintru_rec::negatives_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    target_ids: Tensor,
    negative_ids: Tensor,
    log_sum: Tensor,
    scores: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("softmax", implementation, query)
    if kernels is not None:
        return kernels.backward(grad, query, negatives, log_sum, log_q, target_ids, negative_ids)
    no_negatives = log_sum == -torch.inf  # each was the target itself
    softmax = (scores - log_sum.masked_fill(no_negatives, 0.0).unsqueeze(1)).exp_().mul_(grad.unsqueeze(1)).to(query.dtype)
    return torch.mm(softmax, negatives), torch.mm(softmax.t(), query)


@_forward.register_fake
def _(query, negatives, log_q, target_ids, negative_ids, seen_places, seen_log_weight, save, implementation):
    kept = query.size(0) if save and triton_kernels("softmax", implementation, query) is None else 0
    return log_q.new_empty(query.size(0)), log_q.new_empty(kept, negatives.size(0))


@_backward.register_fake
def _(grad, query, negatives, log_q, target_ids, negative_ids, log_sum, scores, implementation):
    return torch.empty_like(query), torch.empty_like(negatives)


def _setup(ctx, inputs, output) -> None:
    *tensors, _, _, _, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _):
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.implementation), *[None] * 7


_forward.register_autograd(_gradients, setup_context=_setup)
