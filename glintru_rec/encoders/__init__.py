"""Sequence encoders: embeddings of a ragged batch in, one hidden vector per item out. They need torch alone."""

import inspect
from typing import Any

from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.glint_ru import GlintRU
from glintru_rec.encoders.lru_rec import LRURec
from glintru_rec.encoders.rec_grela import RecGRELA
from glintru_rec.encoders.sasrec import SASRec
from glintru_rec.errors import InputError

ENCODERS: dict[str, type[Encoder]] = {"glint_ru": GlintRU, "rec_grela": RecGRELA, "lru_rec": LRURec, "sasrec": SASRec}


def build_encoder(name: str, width: int, options: dict[str, Any]) -> Encoder:
    """Make an encoder by its name in a config.

    Args:
        name: one of `ENCODERS`.
        width: features D.
        options: further arguments of its class.

    Raises:
        InputError: no such encoder, or no such option, or an option out of range.
    """
    if name not in ENCODERS:
        raise InputError(f"model.encoder is {name!r}; it must be one of {', '.join(ENCODERS)}")
    known = [option for option in inspect.signature(ENCODERS[name]).parameters if option != "width"]
    for option in options:
        if option not in known:
            raise InputError(f"model.options.{option} is not an option of {name}; it has {', '.join(known)}")
    return ENCODERS[name](width, **options)


__all__ = ["ENCODERS", "Encoder", "GlintRU", "LRURec", "RecGRELA", "SASRec", "build_encoder"]
