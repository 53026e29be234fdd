"""Causal, ragged, recurrent sequence encoders for sequential recommendation over very large catalogs.

The encoders need torch alone. What needs TorchRec is imported when it is first asked for.
"""

import importlib
from typing import Any

from glintru_rec.encoders import GlintRU, LRURec, RecGRELA, SASRec

_WITH_TORCHREC = ("RankingModel", "RankingModelConfig", "SequenceTower", "load_encoder")

__all__ = ["GlintRU", "LRURec", "RankingModel", "RankingModelConfig", "RecGRELA", "SASRec", "SequenceTower", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCHREC:
        return getattr(importlib.import_module("glintru_rec.ranking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
