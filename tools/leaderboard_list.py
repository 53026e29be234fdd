"""The list of a leaderboard: what it names, and the trainings that it comes to.

A list is a file such as configs/leaderboard/beauty.yaml; each of its entries, with each seed, is a pair: one training, one
evaluation, one folder.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from glintru_rec.config import check, compose, from_yaml
from glintru_rec.errors import InputError
from glintru_rec.training.config import TrainConfig


@dataclass
class Entry:
    """A model to train.

    Attributes:
        name: its row, and its folder.
        overrides: of launch/train.py.
        init_from: name of an earlier entry, with whose best weights, of the same seed, training starts.
        group: a column of the table; entries of a group share a color in the plot.
        note: a sentence below the table.
    """

    name: str = MISSING
    overrides: list[str] = field(default_factory=list)
    init_from: str = ""
    group: str = ""
    note: str = ""


@dataclass
class Published:
    """Figures of others, printed beside ours.

    Attributes:
        name: of the model.
        figures: ``hr@10`` and ``ndcg@10``.
        source: where they stand, and what differs.
    """

    name: str = MISSING
    figures: dict[str, float] = field(default_factory=dict)
    source: str = MISSING


@dataclass
class LeaderboardList:
    """The schema of a list file.

    Attributes:
        title: of the table.
        seeds: of every entry, unless the command line names others.
        overrides: of every entry, before its own.
        entries: what is trained.
        published: what it is compared with.
    """

    title: str = MISSING
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)


@dataclass
class Pair:
    """An entry with a seed: one training, one evaluation."""

    entry: Entry
    seed: int
    folder: Path
    arguments: list[str]
    config: TrainConfig
    base: "Pair | None" = None
    """Must have ended before this one begins: it starts with the base's weights."""

    def __str__(self) -> str:
        return f"{self.entry.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Read what the pair wrote at its end, if it has ended."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None


def plan(listed: LeaderboardList, seeds: list[int], common: list[str], data_path: str, output: Path) -> list[Pair]:
    """Compose the config of every pair, so that what is wrong in the list is said before hours of training.

    Returns:
        All entries with the first seed, then all with the next: a table of a part compares entries on the same seeds.
    """
    folders = [re.sub(r"[^\w.]+", "-", entry.name.lower()).strip("-.") for entry in listed.entries]
    for entry, name in zip(listed.entries, folders):
        check("name of an entry", entry.name, bool(name) and folders.count(name) == 1, "given once, with letters or digits")
    check("seeds", seeds, len(set(seeds)) == len(seeds) > 0, "different numbers, at least one")
    pairs: list[Pair] = []
    for seed in seeds:
        for entry, name in zip(listed.entries, folders):
            bases = [pair for pair in pairs if (pair.entry.name, pair.seed) == (entry.init_from, seed)]
            if entry.init_from and not bases:
                raise InputError(f"entry {entry.name!r}: init_from is {entry.init_from!r}, which is no entry before it")
            folder = output / "runs" / name / f"seed-{seed}"
            fixed = [f"data.path={data_path}", f"output={folder / 'run'}", f"trainer.seed={seed}", "trainer.resume=true"]
            fixed += [f"trainer.init_from={base.folder / 'run'}" for base in bases]
            arguments = [*listed.overrides, *entry.overrides, *common, *fixed]
            try:
                config = compose("train", TrainConfig, arguments)
                pairs.append(Pair(entry, seed, folder, arguments, config, bases[0] if bases else None))
            except InputError as error:
                raise InputError(f"entry {entry.name!r}: {error}") from error
    return pairs


def check_runs(pairs: list[Pair], vocabulary_sha256: str) -> None:
    """Raise an `InputError` if a run was made with another config than is asked for now, or its result with other data."""
    problems = []
    for pair in pairs:
        config_file, result = pair.folder / "run" / "config.yaml", pair.result()
        if config_file.is_file():
            there, asked = _flat(from_yaml(config_file, TrainConfig)), _flat(pair.config)
            differing = [key for key in sorted(there | asked) if there.get(key) != asked.get(key)]
            problems += [f"{pair.folder}: {key} was {there.get(key)!r}, now {asked.get(key)!r}" for key in differing]
        elif result is not None and result["fingerprint"] != fingerprint(pair.config):
            problems.append(f"{pair.folder}: its figures are of another config")
        if result is not None and result["vocabulary_sha256"] != vocabulary_sha256:
            problems.append(f"{pair.folder}: its figures are of another dataset")
    if problems:
        raise InputError(
            "runs in output are not those that are asked for; choose another output, or remove them:\n  "
            + "\n  ".join(problems)
        )


def fingerprint(config: TrainConfig) -> str:
    """Hash what a run's figures depend on, whatever folders it reads and writes."""
    return hashlib.sha256(json.dumps(_flat(config), sort_keys=True).encode()).hexdigest()[:16]


def _flat(config: TrainConfig) -> dict[str, Any]:
    """List a config's keys as ``group.key``, without where the run reads and writes."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield prefix, value
            return
        for key, inner in value.items():
            yield from walk(f"{prefix}.{key}" if prefix else key, inner)

    places = ("output", "data.path", "trainer.resume")
    flat = {key: value for key, value in walk("", asdict(config)) if key not in places and not key.startswith("logging.")}
    flat["trainer.init_from"] = bool(flat["trainer.init_from"])  # a run of the same board, wherever that lies
    return flat
