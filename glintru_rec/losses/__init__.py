"""Losses over a catalog, one value per target, and the negatives they are computed on."""

from glintru_rec.losses.negatives import LogUniform, Negatives, NegativeSampler, Popularity, Uniform
from glintru_rec.losses.sampled import sampled_softmax
from glintru_rec.losses.softmax import full_softmax

__all__ = ["LogUniform", "NegativeSampler", "Negatives", "Popularity", "Uniform", "full_softmax", "sampled_softmax"]
