"""Causal, ragged, recurrent sequence encoders for sequential recommendation over very large catalogs."""

from glintru_rec.encoders import GlintRU, LRURec, RecGRELA, SASRec

__all__ = ["GlintRU", "LRURec", "RecGRELA", "SASRec"]
