"""Measure, on validation histories, what a smaller item table costs.

Shapes: C validation cases, B of them at once.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glintru_rec.data.dataset import EvalCases
from glintru_rec.errors import InputError
from glintru_rec.export.scoring_module import ScoringModule

_KS = (10, 100)
_BATCH = 256


@torch.inference_mode()
def measure_precision(module: Any, exact: ScoringModule, cases: EvalCases, max_cases: int) -> dict[str, float]:
    """Compare the top lists of an exported module with those of the model in fp32; seen items are left out of both.

    Args:
        module: the exported module, with its item table.
        exact: the same model with the table in float32.
        cases: validation histories and the items that followed.
        max_cases: at most so many of them, spread evenly over all, are looked at; none whose target is not known.

    Returns:
        ``users``; ``score_error``, the root mean square difference of the scores of the exact top 100, and
        ``score_spread``, the standard deviation of these scores within a list, averaged; ``overlap@10`` and
        ``overlap@100``, the share of the exact list that the other has too; ``ndcg@10`` of both, and
        ``ndcg@10_change``, relative.

    Raises:
        InputError: there are no cases.
    """
    if not (cases.targets >= 0).any():
        raise InputError(
            "the dataset has no user with three events or more, whose target is known: nothing to measure a precision on"
        )
    sums: dict[str, float] = dict.fromkeys(("error", "spread", "lists", "scores", "ndcg", "exact_ndcg"), 0.0)
    common = dict.fromkeys(_KS, 0.0)
    users = 0
    for item_ids, lengths, targets, side in _batches(cases, max_cases):
        exact_ids, exact_scores = exact.top_k(item_ids, lengths, max(_KS), True, *side)
        ids, _ = module.top_k(item_ids, lengths, max(_KS), True, *side)
        found = exact_ids >= 0
        scores = torch.full_like(exact_scores, torch.nan)
        scores[found] = module.score(item_ids, lengths, exact_ids[found], found.sum(1), *side)
        sums["error"] += float((scores - exact_scores)[found].double().square().sum())
        sums["scores"] += int(found.sum())
        several = found.sum(1) > 1
        means = exact_scores.where(found, 0).sum(1) / found.sum(1).clamp(min=1)
        variance = (exact_scores - means.unsqueeze(1)).where(found, 0).square().sum(1) / found.sum(1).clamp(min=1)
        sums["spread"] += float(variance[several].sqrt().sum())
        sums["lists"] += int(several.sum())
        for k in _KS:
            common[k] += float(_overlap(exact_ids[:, :k], ids[:, :k]).sum())
        sums["ndcg"] += float(_ndcg(ids[:, :10], targets).sum())
        sums["exact_ndcg"] += float(_ndcg(exact_ids[:, :10], targets).sum())
        users += targets.numel()
    change = (sums["ndcg"] - sums["exact_ndcg"]) / sums["exact_ndcg"] if sums["exact_ndcg"] > 0 else 0.0
    return {
        "users": users,
        "score_error": math.sqrt(sums["error"] / max(1.0, sums["scores"])),
        "score_spread": sums["spread"] / max(1.0, sums["lists"]),
        **{f"overlap@{k}": total / users for k, total in common.items()},
        "ndcg@10": sums["ndcg"] / users,
        "ndcg@10_fp32": sums["exact_ndcg"] / users,
        "ndcg@10_change": change,
    }


def _batches(cases: EvalCases, max_cases: int) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Give item_ids, lengths, targets and, where the cases have them, side features of some cases at a time."""
    known = np.flatnonzero(cases.targets >= 0)
    chosen = known[np.unique(np.linspace(0, known.size - 1, min(known.size, max_cases)).astype(np.int64))]
    starts, ends = cases.history_offsets[:-1], cases.history_offsets[1:]
    for first in range(0, chosen.size, _BATCH):
        some = chosen[first : first + _BATCH]
        events = np.concatenate([np.arange(starts[case], ends[case]) for case in some])
        items, lengths, targets = cases.history_items[events], ends[some] - starts[some], cases.targets[some]
        side = () if cases.history_side is None else (torch.from_numpy(cases.history_side[events].astype(np.int64)),)
        yield torch.from_numpy(items), torch.from_numpy(lengths), torch.from_numpy(targets), side


def _overlap(exact_ids: Tensor, ids: Tensor) -> Tensor:
    """Give the share of each row's ids that the other row has; 1 where there are none. -1 is no id."""
    found = exact_ids >= 0
    shared = (exact_ids.unsqueeze(2) == ids.unsqueeze(1)).any(dim=2) & found
    return torch.where(found.any(dim=1), shared.sum(1) / found.sum(1).clamp(min=1), 1.0)


def _ndcg(ids: Tensor, targets: Tensor) -> Tensor:
    """Give 1 / log2(1 + rank) of each row's target, ranks from 1; 0 where it is not there."""
    hits = ids == targets.unsqueeze(1)
    return (hits / torch.log2(torch.arange(ids.size(1)) + 2.0)).sum(1)
