"""Losses over a catalog, one value per target, and the negatives they are computed on."""

from glintru_rec.losses.negatives import uniform_log_q, uniform_negatives
from glintru_rec.losses.softmax import full_softmax, sampled_softmax

__all__ = ["full_softmax", "sampled_softmax", "uniform_log_q", "uniform_negatives"]
