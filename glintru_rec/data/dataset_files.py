"""The files of a prepared dataset: read them, and check that each is whole and of this dataset.

::

    manifest.json                    counts, filters, what was set aside, vocabulary fingerprint, the list of parts
    vocabulary/items.parquet         item_id, index, count
    vocabulary/side_features.json    the values of side features, where there are any (see `side_features`)
    sequences/part-00000.parquet     user_id, items: list<int64>, timestamps: list<int64>, positions: list<int64> (rows of the
                                     log, from 0), and side:NAME: list<int16> for each side feature; users as they first
                                     appear in the log
    rare.parquet                     position, user_id, item_id, timestamp of the events of rare users and items
    set_aside.parquet                every row of the log that could not be used, with its reason

Prepared with ``ids=raw``, a dataset has no vocabulary: the items of its sequences are ids as the log has them, int64 or
strings. Where some of its sequences are in memory, their items are places in a list of just their ids.

Shapes: E events, U users, V items of the catalog, F side features.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.config import wrong_keys
from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary/items.parquet"
RARE_FILE = "rare.parquet"
SET_ASIDE_FILE = "set_aside.parquet"
SIDE_TYPE = pa.int16()
_KINDS = {"vocabulary_sha256": str, "num_users": int, "num_items": int, "num_events": int, "parts": list}
_RAW_KINDS = {"sequences_sha256": str, "num_users": int, "item_id_type": str, "num_events": int, "parts": list}
_PART_KINDS = {"file": str, "num_users": int, "num_events": int}


def side_column(name: str) -> str:
    """Name the column of a side feature in the files of sequences."""
    return f"side:{name}"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the dataset at ``path``.

    Raises:
        InputError: it is missing, is not JSON, lacks a key or has another schema version.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{str(file)!r} does not exist: {str(path)!r} is no prepared dataset; run launch/prepare first"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}; prepare the dataset again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{str(file)!r} has schema version {version!r}, this program reads {SCHEMA_VERSION}; prepare the dataset again"
        )
    wrong = wrong_keys(manifest, _RAW_KINDS if is_raw(manifest) else _KINDS)
    if is_raw(manifest) and not wrong and manifest["item_id_type"] not in ("int64", "string"):
        wrong = ["item_id_type"]
    if wrong or not all(isinstance(part, dict) and not wrong_keys(part, _PART_KINDS) for part in manifest["parts"]):
        named = ", ".join(map(repr, wrong or ["parts"]))
        raise InputError(f"{str(file)!r} lacks {named}, or has values of another kind there; prepare the dataset again")
    return manifest


def is_raw(manifest: dict[str, Any]) -> bool:
    """Whether a dataset's items are ids as the log has them, not indices."""
    return manifest.get("ids") == "raw"


def fingerprint(manifest: dict[str, Any]) -> str:
    """Give the checksum of what items mean in a dataset: of its vocabulary, or where it has raw ids of its sequences."""
    return manifest["sequences_sha256" if is_raw(manifest) else "vocabulary_sha256"]


def read_vocabulary(path: Path, manifest: dict[str, Any]) -> Vocabulary:
    """Read the vocabulary of the dataset at ``path``; give one without items where it has raw ids.

    Raises:
        InputError: it is missing or damaged, or belongs to another dataset.
    """
    if is_raw(manifest):
        return Vocabulary(pa.array([], manifest["item_id_type"]), np.zeros(0, np.int64))
    vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
    if vocabulary.sha256 != manifest["vocabulary_sha256"]:
        raise InputError(
            f"{str(path / VOCABULARY_FILE)!r} has sha256 {vocabulary.sha256[:12]}…, the manifest says "
            f"{manifest['vocabulary_sha256'][:12]}…: it belongs to another dataset; prepare the dataset again"
        )
    return vocabulary


class Sequences(NamedTuple):
    """The users of a part of a dataset, or of some of its row groups."""

    user_ids: pa.Array
    """Original ids, ``[U]``."""
    lengths: np.ndarray
    """Number of events of each, int64 ``[U]``."""
    items: np.ndarray
    """Vocabulary indices of all, or places in ``ids``, int64 ``[E]``."""
    side_ids: np.ndarray
    """Side features of all, int16 ``[E, F]``."""
    ids: pa.Array | None = None
    """Where they are raw, the ids of all, each once."""


def columns_of(side: SideVocabulary) -> list[str]:
    """Name the columns of a part that are read."""
    return ["user_id", "items", *map(side_column, side.names)]


def read_part(
    file: Path, part: dict[str, Any], manifest: dict[str, Any], vocabulary: Vocabulary, side: SideVocabulary
) -> Sequences:
    """Read one of the manifest's parts.

    Raises:
        InputError: it is missing or damaged, or is not what the manifest says.
    """
    with reading_part(file):
        sequences = check_sequences(pq.read_table(file, columns=columns_of(side)), file, manifest, vocabulary, side)
    check_part(file, part, len(sequences.user_ids), len(sequences.items))
    return sequences


@contextmanager
def reading_part(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a part into an `InputError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{str(file)!r} is missing, but the manifest lists it; copy or prepare the dataset again") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}; copy or prepare the dataset again") from error


def check_part(file: Path, part: dict[str, Any], num_users: int, num_events: int) -> None:
    """Raise an `InputError` unless a part holds what the manifest says."""
    if (num_users, num_events) != (part["num_users"], part["num_events"]):
        raise InputError(
            f"{str(file)!r} holds {num_users} users with {num_events} events, the manifest says {part['num_users']} with "
            f"{part['num_events']}; copy or prepare the dataset again"
        )


def check_sequences(
    table: pa.Table,
    file: Path,
    manifest: dict[str, Any],
    vocabulary: Vocabulary,
    side: SideVocabulary = NO_SIDE,
    first_row: int = 0,
) -> Sequences:
    """Take the columns ``user_id``, ``items`` and side features of a part apart, or of its rows from ``first_row`` on.

    Raises:
        InputError: a value is null, or no index of the vocabulary, or no raw id of the dataset's type.
    """
    users, sequences = (column.combine_chunks() for column in table.select(["user_id", "items"]).columns)
    items = sequences.flatten()
    kind = vocabulary.id_type if is_raw(manifest) else "int64"
    if str(items.type) != kind or items.null_count or sequences.null_count or users.null_count:
        raise InputError(f"{str(file)!r} holds nulls, or items that are {items.type}, not {kind}; prepare the dataset again")
    lengths = pc.list_value_length(sequences).to_numpy().astype(np.int64)
    if is_raw(manifest):
        raw = items.dictionary_encode()
        places = raw.indices.to_numpy().astype(np.int64)
        return Sequences(users, lengths, places, _side_ids(table, file, side, len(places)), raw.dictionary)
    indices, num_items = items.to_numpy(), vocabulary.num_items
    outside = np.flatnonzero((indices < 0) | (indices >= num_items))
    if len(outside):
        row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
        raise InputError(
            f"{str(file)!r} holds item index {indices[outside[0]]} (user {users[row].as_py()!r}, row {first_row + row + 1}), "
            f"which is not in [0, {num_items}); prepare the dataset again"
        )
    return Sequences(users, lengths, indices, _side_ids(table, file, side, len(indices)))


def _side_ids(table: pa.Table, file: Path, side: SideVocabulary, num_events: int) -> np.ndarray:
    """Take the side features of a part apart: int16 ``[E, F]``."""
    ids = np.empty((num_events, len(side.names)), np.int16)
    for place, (name, size) in enumerate(zip(side.names, side.sizes)):
        column = table[side_column(name)].combine_chunks().flatten()
        is_whole = column.type == SIDE_TYPE and not column.null_count and len(column) == num_events
        if not is_whole or (num_events and not 0 <= pc.min(column).as_py() <= pc.max(column).as_py() < size):
            raise InputError(
                f"{str(file)!r} holds no index in [0, {size}) of side feature {name!r} for each event; "
                f"prepare the dataset again"
            )
        ids[:, place] = column.to_numpy()
    return ids
