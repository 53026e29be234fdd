"""Negative items shared by a batch, and the probability with which they were drawn."""

import math

import torch
from torch import Tensor


def uniform_negatives(num_items: int, num_negatives: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw items uniformly, with replacement.

    Args:
        num_items: catalog size V; ids are ``0 .. V-1``.
        num_negatives: draws K.
        generator: source of randomness (on the CPU); the global one when absent.

    Returns:
        int64 ``[K]``.
    """
    return torch.randint(num_items, (num_negatives,), dtype=torch.int64, generator=generator)


def uniform_log_q(num_items: int, num_negatives: int) -> float:
    """Log of how often an item is expected among K uniform draws: log(K / V)."""
    return math.log(num_negatives / num_items)
