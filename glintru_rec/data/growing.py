"""A dataset as the start of another one, to which new days are appended.

The grown dataset has the events that preparing all the logs at once would give, in the same sequences: every event is kept with
its position in the log, and those of rare users and items lie in ``rare.parquet``. Nothing that was kept is ever lost, as more
events can only enlarge the largest set in which each user and item has enough of them. Only the order of the items differs:
those of the base keep their indices, new ones follow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from glintru_rec.data.cleaning import Cleaned
from glintru_rec.data.dataset_files import (
    MANIFEST_FILE,
    RARE_FILE,
    SET_ASIDE_FILE,
    VOCABULARY_FILE,
    is_raw,
    read_manifest,
    read_vocabulary,
    reading_part,
)
from glintru_rec.data.engine import Engine, fetch_one
from glintru_rec.data.reader_dataset import RowGroupDataset, list_row_groups
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError


@dataclass(frozen=True)
class Base:
    """The dataset to which events are appended.

    Attributes:
        path: its folder.
        manifest: what its ``manifest.json`` holds.
        vocabulary: its items, whose indices stay; without items where it has raw ids.
    """

    path: Path
    manifest: dict[str, Any]
    vocabulary: Vocabulary

    @classmethod
    def open(cls, path: Path, filters: dict[str, int], raw: bool = False) -> "Base":
        """Open a dataset to append to.

        Args:
            path: its folder.
            filters: the least number of events of a user and of an item; the base's own.
            raw: whether the dataset that comes of it has raw ids, as the base then must have.

        Raises:
            InputError: no dataset, an incomplete or damaged one, or one of other filters or with ids of the other kind.
        """
        manifest = read_manifest(path)
        if is_raw(manifest) != raw:
            own, given = (f"ids={'raw' if kind else 'dense'}" for kind in (is_raw(manifest), raw))
            raise InputError(f"base {str(path)!r} was prepared with {own}, not {given}; give the same value")
        files = [path / part["file"] for part in manifest["parts"]]
        files += [path / RARE_FILE, path / SET_ASIDE_FILE]
        missing = [file for file in files if not file.is_file()]
        columns = [] if missing else [_columns(file) for file in files]
        if missing or "positions" not in columns[0]:
            lacks = f"has no {str(missing[0])!r}" if missing else f"has no column 'positions' in {str(files[0])!r}"
            raise InputError(f"base {str(path)!r} {lacks}, so nothing can be appended to it; prepare it again from its logs")
        if "side_features" in manifest:
            raise InputError(
                f"base {str(path)!r} has side features, which a log cannot be appended to yet; prepare all days at once"
            )
        if manifest["filters"] != filters:
            given, own = (" ".join(f"{key}={value}" for key, value in each.items()) for each in (filters, manifest["filters"]))
            raise InputError(f"base {str(path)!r} was prepared with {own}, not {given}; give the same values")
        for part in manifest["parts"]:
            list_row_groups(path / part["file"], part)
        accounted = manifest["num_events"] + sum(manifest["set_aside"].values())
        if manifest["rows_in"] != accounted:
            raise InputError(
                f"{str(path / MANIFEST_FILE)!r} counts {manifest['rows_in']} rows, but events and rows set aside add up to "
                f"{accounted}; copy or prepare the base again"
            )
        return cls(path, manifest, read_vocabulary(path, manifest))

    @property
    def num_rows(self) -> int:
        """Number of rows of its logs: the position of the first new one."""
        return self.manifest["rows_in"]

    @property
    def types(self) -> Cleaned:
        """What its columns were read as; the new log's are read as the same."""
        user, item, time = (self.manifest[key] for key in ("user_id_type", "item_id_type", "time_unit"))
        return Cleaned(user, item, time, self.manifest.get("times_were_seconds", False))

    @property
    def set_aside(self) -> dict[str, int]:
        """The number of rows that stay set aside, by reason: all but those of rare users and items, which may come back."""
        return {reason: count for reason, count in self.manifest["set_aside"].items() if not reason.startswith("rare_")}

    def open_tables(self, engine: Engine) -> tuple[str, str]:
        """Open its files as tables.

        Returns:
            Query of its clean events, rare ones among them (position, time, user_id, item_id), and query of its items (item_id,
            known_index).
        """
        parts = [self.path / part["file"] for part in self.manifest["parts"]]
        engine.open_parquet("base_sequence", parts, lists=("items", "timestamps", "positions"))
        engine.open_parquet("base_rare", [self.path / RARE_FILE])
        item, vocabulary, items = "items AS item_id", "", ""
        if not is_raw(self.manifest):
            engine.open_parquet("base_item", [self.path / VOCABULARY_FILE])
            item, vocabulary = "item_id", "JOIN base_item ON base_sequence.items = base_item.index"
            items = "SELECT item_id, base_item.index AS known_index FROM base_item"
        kept = f"SELECT positions AS position, timestamps AS time, user_id, {item} FROM base_sequence {vocabulary}"
        events = f"{kept} UNION ALL SELECT position, base_rare.timestamp AS time, user_id, item_id FROM base_rare"
        self._check_counts(engine, kept)
        return events, items

    def _check_counts(self, engine: Engine, kept: str) -> None:
        """Raise an `InputError` unless the tables hold the events that the manifest counts."""
        found = fetch_one(engine, f"SELECT count(*) FROM ({kept})")
        if found != self.manifest["num_events"]:
            for _ in RowGroupDataset.open(self.path, 1).train_blocks():
                pass  # an item that the vocabulary lacks is named
            raise InputError(
                f"{str(self.path / MANIFEST_FILE)!r} counts {self.manifest['num_events']} events, its parts hold {found}; "
                f"copy or prepare the base again"
            )
        num_rare = sum(self.manifest["set_aside"].get(reason, 0) for reason in ("rare_user", "rare_item"))
        found = fetch_one(engine, "SELECT count(*) FROM base_rare")
        if found != num_rare:
            raise InputError(
                f"{str(self.path / RARE_FILE)!r} holds {found} events, the manifest says {num_rare}; "
                f"copy or prepare the base again"
            )

    def growth(self, engine: Engine, num_events: int, num_users: int, vocabulary: Vocabulary | None) -> dict[str, Any]:
        """Count what the new log changed, for the manifest.

        Args:
            engine: with the table ``kept``.
            num_events: of the grown dataset.
            num_users: of the grown dataset.
            vocabulary: of the grown dataset; None where it has raw ids.
        """
        of_items = {}
        if vocabulary is not None:
            num_known = self.vocabulary.num_items
            assert vocabulary.item_ids.slice(0, num_known).equals(self.vocabulary.item_ids), "old items keep their indices"
            of_items = {"new_items": vocabulary.num_items - num_known, "base_vocabulary_sha256": self.vocabulary.sha256}
        is_new = f"position >= {self.num_rows}"
        new_events = fetch_one(engine, f"SELECT count(*) FROM kept WHERE {is_new}")
        late_events = f"""
            SELECT count(*) FROM kept JOIN (SELECT user_key, max(time) AS latest FROM kept WHERE NOT {is_new} GROUP BY user_key)
            AS base_user USING (user_key) WHERE {is_new} AND time < latest"""
        return {
            "base": str(self.path),
            "new_events": new_events,
            "late_events": fetch_one(engine, late_events),
            "returned_events": num_events - new_events - self.manifest["num_events"],
            "new_users": num_users - self.manifest["num_users"],
            **of_items,
        }


def _columns(file: Path) -> list[str]:
    """Name the columns of a file of a dataset; its footer must be whole."""
    with reading_part(file):
        return pq.read_schema(file).names
