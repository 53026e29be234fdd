"""Causal, ragged, recurrent sequence encoders for sequential recommendation over very large catalogs."""

from glintru_rec.encoders import GlintRU

__all__ = ["GlintRU"]
