"""Causal, ragged, recurrent sequence encoders for sequential recommendation over very large catalogs.

The encoders need torch alone. What needs TorchRec is imported when it is first asked for.
"""

import importlib
from typing import Any

from glintru_rec.encoders import GlintRU, LRURec, RecGRELA, SASRec

_WITH_TORCHREC = ("RankingModel", "RankingModelConfig", "SequenceTower", "load_encoder")

# Without the others: `from glintru_rec import *` works with torch alone.
__all__ = ["GlintRU", "LRURec", "RecGRELA", "SASRec"]


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCHREC:
        try:
            return getattr(importlib.import_module("glintru_rec.ranking"), name)
        except ImportError as error:  # AttributeError is what hasattr understands
            raise AttributeError(f"glintru_rec.{name} needs glintru_rec installed with TorchRec: {error}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_TORCHREC})
