"""A ranking dataset in memory.

::

    manifest.json             periods, tables' sizes, scales, tasks, expressions
    events.parquet            an event per row; users one after the other, each in order of time
    vocabulary/*.parquet      value, count; the row of a value in its table is its place + 1, row 0 is for unknown ones
    train_log.parquet         the training period as a log, to pre-train an encoder on
    examples.parquet          where asked for: a later period with raw values, to score with a trained model

Shapes: E events, U users, F dense features, K tasks.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.errors import InputError
from glintru_rec.files import sha256_of, write_json

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
EVENTS_FILE = "events.parquet"
LOG_FILE = "train_log.parquet"
EXAMPLES_FILE = "examples.parquet"
ITEM_VOCABULARY_FILE = "vocabulary/item.parquet"
SPLITS = ("train", "valid", "test")
ITEM = "item"
FEATURES_FILE = "features.json"
# What scoring needs of a dataset's manifest.
_OF_FEATURES = ("num_embeddings", "dense", "tasks", "expressions")


class Lists(NamedTuple):
    """A list of ids for each event."""

    values: np.ndarray
    """int64 ``[N]``."""
    offsets: np.ndarray
    """int64 ``[E + 1]``."""


@dataclass(frozen=True, eq=False)
class RankingDataset:
    """All events of a prepared ranking dataset.

    Attributes:
        manifest: what ``manifest.json`` holds.
        item_ids: original ids of the item table's rows 1, 2, ….
        item_sha256: fingerprint of the file that they stand in.
        user: int64 ``[E]``, ascending.
        split: 0, 1 or 2: place in `SPLITS`, int64 ``[E]``.
        seen: how many of the user's events came before this one's time, int64 ``[E]``.
        sequence: what a history tells of each event: name → int64 ``[E]``; `ITEM` first.
        sparse: name → lists of the event's own ids (of one id each, where the feature is no list).
        dense: float32 ``[E, F]``.
        labels: float32 ``[E, K]``, NaN where the event says nothing.
    """

    manifest: dict[str, Any]
    item_ids: pa.Array
    item_sha256: str
    user: np.ndarray
    split: np.ndarray
    seen: np.ndarray
    sequence: dict[str, np.ndarray]
    sparse: dict[str, Lists]
    dense: np.ndarray
    labels: np.ndarray

    @classmethod
    def open(cls, path: str | Path) -> "RankingDataset":
        """Read a dataset.

        Raises:
            InputError: a file is missing or corrupt, an id is out of its table's range, or a history's feature has not one
                value for each event.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text())
            events = pq.read_table(path / EVENTS_FILE).combine_chunks()
            item_ids = pq.read_table(path / ITEM_VOCABULARY_FILE)["value"].combine_chunks()
            item_sha256 = sha256_of(path / ITEM_VOCABULARY_FILE)
            version = manifest["schema_version"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise InputError(f"data.path={path} is no ranking dataset: {error}; run launch/prepare.py task=ranking") from error
        if version != SCHEMA_VERSION:
            raise InputError(f"data.path={path} has schema version {version!r}, this program reads {SCHEMA_VERSION}")
        features = {name: _lists(events[name].chunk(0)) for name in manifest["num_embeddings"]}
        for name, lists in features.items():
            rows = manifest["num_embeddings"][name]
            if not name.startswith("sparse:") and len(lists.values) != len(events):
                raise InputError(
                    f"{path / EVENTS_FILE}: column {name!r} has {len(lists.values)} values for {len(events)} events; "
                    "a sequence feature has one each: prepare it again"
                )
            if len(lists.values) and not 0 <= lists.values.min() <= lists.values.max() < rows:
                raise InputError(f"{path / EVENTS_FILE}: column {name!r} holds an id outside [0, {rows}); prepare it again")
        return cls(
            manifest=manifest,
            item_ids=item_ids,
            item_sha256=item_sha256,
            user=events["user"].to_numpy(),
            split=events["split"].to_numpy().astype(np.int64),
            seen=events["seen"].to_numpy(),
            sequence={
                name.removeprefix("sequence:"): lists.values
                for name, lists in features.items()
                if not name.startswith("sparse:")
            },
            sparse={name.removeprefix("sparse:"): lists for name, lists in features.items() if name.startswith("sparse:")},
            dense=_columns(events, "dense:", manifest["dense"]),
            labels=_columns(events, "tasks:", manifest["tasks"]),
        )

    def num_embeddings(self, group: str) -> dict[str, int]:
        """Give the table sizes of a group's features: ``sparse``, or ``sequence`` (with `ITEM`)."""
        return num_embeddings(self.manifest, group)


def num_embeddings(manifest: dict[str, Any], group: str) -> dict[str, int]:
    """Give the table sizes of a group's features: ``sparse``, or ``sequence`` (with `ITEM`)."""
    sizes = manifest["num_embeddings"]
    chosen = {name.removeprefix(f"{group}:"): rows for name, rows in sizes.items() if name.startswith(f"{group}:")}
    return {ITEM: sizes[ITEM]} | chosen if group == "sequence" else chosen


def vocabulary_file(feature: str) -> str:
    """Name the file of the values of `ITEM`, ``sparse:NAME`` or ``sequence:NAME``."""
    return f"vocabulary/{feature.replace(':', '.')}.parquet"


def keep_features(dataset: str | Path, run_dir: Path) -> None:
    """Copy into a run directory what its model must know of the features to be of use without the dataset."""
    manifest = _read_json(Path(dataset) / MANIFEST_FILE)
    (run_dir / "vocabulary").mkdir(exist_ok=True)
    for feature in manifest["num_embeddings"]:
        shutil.copyfile(Path(dataset) / vocabulary_file(feature), run_dir / vocabulary_file(feature))
    write_json(run_dir / FEATURES_FILE, {key: manifest[key] for key in _OF_FEATURES})


def check_features(dataset: str | Path, run_dir: Path) -> None:
    """Raise an `InputError` where a run that goes on was trained on other features, or values of them, than a dataset has."""
    if not (run_dir / FEATURES_FILE).is_file():
        return
    kept, manifest = _read_json(run_dir / FEATURES_FILE), _read_json(Path(dataset) / MANIFEST_FILE)
    for key in _OF_FEATURES:
        if kept[key] != manifest[key]:
            raise InputError(f"{run_dir} was trained with other {key} than data.path={dataset} has; choose another output")
    for feature in kept["num_embeddings"]:
        if sha256_of(run_dir / vocabulary_file(feature)) != sha256_of(Path(dataset) / vocabulary_file(feature)):
            raise InputError(f"{run_dir} was trained with other values of {feature} than data.path={dataset} has")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _lists(column: pa.Array) -> Lists:
    if pa.types.is_list(column.type):
        return Lists(column.flatten().to_numpy(), column.offsets.to_numpy().astype(np.int64))
    return Lists(column.to_numpy(), np.arange(len(column) + 1))


def _columns(events: pa.Table, prefix: str, names: Any) -> np.ndarray:
    columns = [events[prefix + name].to_numpy() for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((len(events), 0), np.float32)
