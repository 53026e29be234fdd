"""Figures of a ranking model: AUC, logloss and GAUC of a binary task, the root mean squared error of a number."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc
from torchrec.metrics.gauc import get_auc_states

_USERS_AT_ONCE = 4096


def binary_metrics(logits: Tensor, labels: Tensor, users: np.ndarray) -> dict[str, float]:
    """Measure predicted probabilities.

    Args:
        logits: float ``[N]``.
        labels: 0 or 1, float ``[N]``.
        users: whose example each is, ascending, int64 ``[N]``.

    Returns:
        ``auc`` (torchmetrics), ``logloss`` in nats, and ``gauc``: the mean of the users' own AUC, over users with labels of
        both kinds (TorchRec).
    """
    return {
        "auc": float(binary_auroc(logits.sigmoid().double(), labels.long())),
        "logloss": float(functional.binary_cross_entropy_with_logits(logits.double(), labels.double())),
        "gauc": _gauc(logits, labels, users),
    }


def number_metrics(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure predicted numbers, float ``[N]``: ``rmse``."""
    return {"rmse": float((values.double() - labels.double()).square().mean().sqrt())}


def _gauc(logits: Tensor, labels: Tensor, users: np.ndarray) -> float:
    # TorchRec lays users out as a rectangle: some of them at a time.
    starts = np.append(np.flatnonzero(np.append(True, np.diff(users) != 0)), len(users))
    total, count = 0.0, 0.0
    for first in range(0, len(starts) - 1, _USERS_AT_ONCE):
        edges = starts[first : first + _USERS_AT_ONCE + 1]
        part = slice(edges[0], edges[-1])
        states = get_auc_states(
            labels[None, part].float(),
            logits[None, part].float(),
            torch.ones_like(labels[None, part], dtype=torch.float32),
            torch.from_numpy(np.diff(edges)),
        )
        total, count = total + float(states["auc_sum"]), count + float(states["num_samples"])
    return total / count if count else float("nan")
