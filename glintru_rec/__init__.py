"""Causal, ragged, recurrent sequence encoders for sequential recommendation over very large catalogs.

The names here are the public ones, and stay. The encoders need torch alone; what needs more is imported when it is first
asked for.
"""

import importlib
from importlib.metadata import version
from typing import Any

from glintru_rec.encoders import Ensemble, GlintRU, LRURec, RecGRELA, SASRec
from glintru_rec.errors import InputError

# Where the other public names are; `__init__.pyi` lists them for type checkers.
_ELSEWHERE = {
    "full_softmax": "glintru_rec.losses",
    "sampled_softmax": "glintru_rec.losses",
    "SequenceDataset": "glintru_rec.data.dataset",
    "Artifact": "glintru_rec.export",
    "RankingModel": "glintru_rec.ranking",
    "RankingModelConfig": "glintru_rec.ranking",
    "SequenceTower": "glintru_rec.ranking",
    "load_encoder": "glintru_rec.ranking",
}

# Without the others: `from glintru_rec import *` works with torch alone.
__all__ = ["Ensemble", "GlintRU", "InputError", "LRURec", "RecGRELA", "SASRec"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("glintru_rec")
    if name in _ELSEWHERE:
        try:
            return getattr(importlib.import_module(_ELSEWHERE[name]), name)
        except ImportError as error:  # of an AttributeError, `from glintru_rec import …` would leave the reason out
            raise ImportError(f"glintru_rec.{name} needs glintru_rec installed with TorchRec: {error}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ELSEWHERE, "__version__"})
