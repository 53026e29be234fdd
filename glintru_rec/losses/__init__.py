"""Losses over a catalog, one value per target, and the negatives they are computed on."""

from glintru_rec.losses.negatives import LogUniform, Negatives, NegativeSampler, Popularity, Uniform
from glintru_rec.losses.sampled import sampled_softmax
from glintru_rec.losses.seen import Seen, seen_before
from glintru_rec.losses.softmax import full_softmax

__all__ = [
    "LogUniform",
    "NegativeSampler",
    "Negatives",
    "Popularity",
    "Seen",
    "Uniform",
    "full_softmax",
    "sampled_softmax",
    "seen_before",
]
