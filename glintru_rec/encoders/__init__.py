"""Sequence encoders: embeddings of a ragged batch in, one hidden vector per item out. They need torch alone."""

import inspect
from typing import Any, get_args, get_type_hints

from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.ensemble import Ensemble
from glintru_rec.encoders.glint_ru import GlintRU
from glintru_rec.encoders.lru_rec import LRURec
from glintru_rec.encoders.rec_grela import RecGRELA
from glintru_rec.encoders.sasrec import SASRec
from glintru_rec.errors import InputError

ENCODERS: dict[str, type[Encoder]] = {"glint_ru": GlintRU, "rec_grela": RecGRELA, "lru_rec": LRURec, "sasrec": SASRec}


def build_encoder(name: str, width: int, options: dict[str, Any], section: str = "model") -> Encoder:
    """Make an encoder by its name in a config.

    Args:
        name: one of `ENCODERS`; or several, joined by ``+``, for an `Ensemble` in which each has an equal share of the width.
        width: features D.
        options: further arguments of its class; of an ensemble, those of all its members, and below a member's name its own.
        section: of the config, for messages.

    Raises:
        InputError: no such encoder, or no such option, or an option out of range.

    Example:
        >>> options = {"dropout": 0.6, "glint_ru": {"num_heads": 2}}
        >>> build_encoder("glint_ru+lru_rec", 64, options).member_width
        32
    """
    names = name.split("+")
    if len(names) == 1:
        return _build_one(name, width, options, section)
    if width % len(names):
        raise InputError(f"{section}.embedding_dim is {width}; it must be a multiple of {len(names)}, the encoders of {name}")
    common = {option: value for option, value in options.items() if option not in names}
    members = []
    for member in names:
        own = options.get(member, {})
        if not isinstance(own, dict):
            raise InputError(f"{section}.options.{member} is {own!r}; it must hold options of {member}")
        members.append(_build_one(member, width // len(names), common | own, section))
    return Ensemble(members)


def _build_one(name: str, width: int, options: dict[str, Any], section: str) -> Encoder:
    if name not in ENCODERS:
        raise InputError(f"{section}.encoder is {name!r}; it must be one of {', '.join(ENCODERS)}")
    known = [option for option in inspect.signature(ENCODERS[name]).parameters if option != "width"]
    for option in options:
        if option not in known:
            raise InputError(f"{section}.options.{option} is not an option of {name}; it has {', '.join(known)}")
    hints = get_type_hints(ENCODERS[name].__init__)
    for option, value in options.items():
        if not _is_a(value, hints[option]):
            kind = getattr(hints[option], "__name__", str(hints[option]))
            raise InputError(f"{section}.options.{option} is {value!r}; {name} takes a value of type {kind}")
    # A YAML file says 0 for 0.0, which TorchScript tells apart.
    given = {option: float(value) if hints[option] is float else value for option, value in options.items()}
    return ENCODERS[name](width, **given)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value from a config file fits an annotation: a bool is no number, an int is a float too."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


__all__ = ["ENCODERS", "Encoder", "Ensemble", "GlintRU", "LRURec", "RecGRELA", "SASRec", "build_encoder"]
