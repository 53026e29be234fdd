"""The offline scoring job: parquet of users in, parquet of scores out.

::

    part-00000.parquet                     one output file per input file, under the same name: user_id, and
                                           item_ids and scores (candidates, top_k) or embedding (encode)
    rejects/part-00000.parquet             rows that could not be scored: user_id, reason, fragment, row (from 1)
    unknown_candidates/part-00000.parquet  candidates that the vocabulary lacks: user_id, item_id, fragment, row
    report.json                            what became of every row
    _SUCCESS                               written last

The folders are there only where there is something to put into them.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from glintru_rec.config import check, one_of
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.files import check_free, write_json, write_text
from glintru_rec.scoring.fragments import Fragment, open_fragments
from glintru_rec.scoring.rows import Columns, Rows
from glintru_rec.scoring.writer import FragmentWriter

MODES = ("candidates", "top_k", "encode", "update")
REJECTS_FOLDER = "rejects"
UNKNOWN_CANDIDATES_FOLDER = "unknown_candidates"
REPORT_FILE = "report.json"
SUCCESS_FILE = "_SUCCESS"


@dataclass
class ScoreConfig:
    """What to score, and how.

    An item of a history that the vocabulary lacks is skipped and counted; so is a candidate, which is listed too.

    Attributes:
        artifact: folder that launch/export.py wrote.
        input: parquet file, folder of them or glob pattern; one row per user, or one per event in mode update.
        output: folder to write; it must not exist, or be empty.
        mode: ``candidates`` scores each row's own candidates; ``top_k`` finds the best items of the catalog; ``encode``
            writes the user's vector (`glintru_rec.export.artifact` says what item vectors go with it); ``update`` carries
            the states of users on by new events and finds the best items of those who acted (see
            `glintru_rec.scoring.update`).
        state: folder of the store of user states, made when missing; mode update only.
        top_k: items to find for each user (fewer where the catalog has no more).
        exclude_seen: top_k and update leave out the items of the history.
        batch_size: users scored at once.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        user_column: name of the column of user ids, integers or strings.
        history_column: name of the column of histories, lists of item ids, oldest first.
        candidates_column: name of the column of candidates, lists of item ids; mode candidates only.
        item_column: name of the column of item ids; mode update only.
        time_column: name of the column of times, whole numbers or timestamps; mode update only.
    """

    artifact: str
    input: str
    output: str
    mode: str
    state: str = ""
    top_k: int = 100
    exclude_seen: bool = True
    batch_size: int = 1024
    device: str = "cpu"
    user_column: str = "user_id"
    history_column: str = "history"
    candidates_column: str = "candidates"
    item_column: str = "item_id"
    time_column: str = "timestamp"

    def __post_init__(self):
        one_of("mode", self.mode, MODES)
        names = ("user_column", "history_column", "candidates_column", "item_column", "time_column")
        for key in ("artifact", "input", "output", *names):
            check(key, getattr(self, key), bool(getattr(self, key)), "a text that is not empty")
        check("top_k", self.top_k, self.top_k >= 1, "at least 1")
        check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        if self.mode == "update":
            check("state", self.state, bool(self.state), "the folder of the user states, as mode is 'update'")
            keys = ("user_column", "item_column", "time_column")
        else:
            check("state", self.state, not self.state, f"left out, as mode {self.mode!r} keeps no states")
            keys = ("user_column", "history_column", "candidates_column")
        columns = tuple(getattr(self, key) for key in keys)
        check(", ".join(keys), columns, len({name.lower() for name in columns}) == 3, "three different names")
        kind, _, number = self.device.partition(":")
        known = self.device in ("cpu", "cuda") or (kind == "cuda" and number.isdigit())
        check("device", self.device, known, "cpu, cuda or cuda:N")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"device is {self.device!r}; this machine has {torch.cuda.device_count()} CUDA device(s)")


@dataclass(frozen=True)
class ScoreReport:
    """What became of every row: ``rows_in`` is ``rows_scored`` and the sum of ``rows_set_aside``.

    Attributes:
        rows_in: rows read.
        rows_scored: rows of the output.
        rows_set_aside: the others, by `Reason`.
        unknown_history_items: items of histories that the vocabulary lacks, each time they occur.
        unknown_candidates: candidates that the vocabulary lacks, each time they occur.
        seconds: from the start to the last file.
        rows_per_second: rows read per second.
    """

    rows_in: int
    rows_scored: int
    rows_set_aside: dict[str, int]
    unknown_history_items: int
    unknown_candidates: int
    seconds: float
    rows_per_second: float


def score(config: ScoreConfig, progress: Callable[[int, int], None] | None = None) -> ScoreReport:
    """Score the users of a parquet input with an artifact.

    Memory is bounded by ``batch_size``, not by the input.

    Args:
        config: what to score, and how; for mode update there is `glintru_rec.scoring.update_states`.
        progress: called after every batch with the rows done and the rows there are.

    Returns:
        The report, which is also written to ``report.json``.

    Raises:
        InputError: the artifact, the input or the output folder cannot be used. The input's files are all checked before
            the first is scored; files written before damage is found in a later one stay, without ``_SUCCESS``.
    """
    check("mode", config.mode, config.mode != "update", "one that scores histories; for update, call update_states()")
    start = time.monotonic()
    output = Path(config.output)
    check_free("output", output)
    artifact = Artifact.load(config.artifact, config.device)
    candidates_column = config.candidates_column if config.mode == "candidates" else None
    columns = Columns(config.user_column, config.history_column, candidates_column)
    fragments = open_fragments(config.input, columns, artifact.vocabulary)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {config.output!r} cannot be written: {error.strerror}") from error
    total = sum(fragment.num_rows for fragment in fragments)
    counts: Counter[str] = Counter()
    set_aside: Counter[str] = Counter()
    for fragment in fragments:
        with FragmentWriter(output, fragment.name, _schema(fragment, config, artifact)) as files:
            for rows in fragment.read(config.batch_size, artifact.vocabulary):
                files.write_scores(_scored(rows, fragment, config, artifact))
                files.write_beside(REJECTS_FOLDER, rows.set_aside)
                files.write_beside(UNKNOWN_CANDIDATES_FOLDER, rows.unknown_candidates)
                set_aside.update(rows.set_aside["reason"].to_pylist())
                counts["rows_in"] += rows.num_read
                counts["rows_scored"] += len(rows.users)
                counts["unknown_history_items"] += rows.unknown_history_items
                counts["unknown_candidates"] += len(rows.unknown_candidates)
                if progress is not None:
                    progress(counts["rows_in"], total)
    assert counts["rows_in"] == total == counts["rows_scored"] + set_aside.total()
    seconds = time.monotonic() - start
    report = ScoreReport(
        rows_in=total,
        rows_scored=counts["rows_scored"],
        rows_set_aside=dict(sorted(set_aside.items())),
        unknown_history_items=counts["unknown_history_items"],
        unknown_candidates=counts["unknown_candidates"],
        seconds=round(seconds, 3),
        rows_per_second=round(total / seconds, 1),
    )
    written: dict[str, Any] = {**asdict(report), "config": asdict(config), "model": artifact.manifest["provenance"]}
    write_json(output / REPORT_FILE, written)
    write_text(output / SUCCESS_FILE, "")
    return report


def _schema(fragment: Fragment, config: ScoreConfig, artifact: Artifact) -> pa.Schema:
    """Give the columns of a fragment's output."""
    user = ("user_id", fragment.user_type)
    if config.mode == "encode":
        return pa.schema([user, ("embedding", pa.list_(pa.float32(), artifact.manifest["embedding_dim"]))])
    return ranked_schema(fragment.user_type, artifact)


def ranked_schema(user_type: pa.DataType, artifact: Artifact) -> pa.Schema:
    """Give the columns of an output of items and their scores."""
    item_ids = pa.list_(artifact.vocabulary.item_ids.type)
    return pa.schema([("user_id", user_type), ("item_ids", item_ids), ("scores", pa.list_(pa.float32()))])


@torch.inference_mode()
def _scored(rows: Rows, fragment: Fragment, config: ScoreConfig, artifact: Artifact) -> pa.Table:
    """Run the model on one batch."""
    item_ids, lengths, candidates, candidate_lengths = (
        torch.from_numpy(array).to(config.device) for array in (*rows.history, *rows.candidates)
    )
    schema = _schema(fragment, config, artifact)
    if config.mode == "encode":
        query = artifact.module.encode(item_ids, lengths).cpu().numpy()
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(query.ravel()), query.shape[1])
        return pa.table([rows.users, embedding], schema=schema)
    if config.mode == "candidates":
        scores = artifact.module.score(item_ids, lengths, candidates, candidate_lengths)
        return _listed(rows.users, candidates, candidate_lengths, scores, artifact)
    k = min(config.top_k, artifact.vocabulary.num_items)
    best, best_scores = artifact.module.top_k(item_ids, lengths, k, config.exclude_seen)
    return ranked_table(rows.users, best, best_scores, artifact)


def ranked_table(users: pa.Array, ids: Tensor, scores: Tensor, artifact: Artifact) -> pa.Table:
    """Write what ``top_k`` found of each user, ``[B, k]``, less the empty places, as user_id, item_ids and scores."""
    found = ids >= 0
    return _listed(users, ids[found], found.sum(1), scores[found], artifact)


def _listed(users: pa.Array, item_ids: Tensor, lengths: Tensor, scores: Tensor, artifact: Artifact) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], lengths.cumsum(0).cpu().numpy()]), pa.int32())
    columns = (artifact.vocabulary.decode(item_ids.cpu().numpy()), pa.array(scores.cpu().numpy()))
    lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
    return pa.table([users, *lists], schema=ranked_schema(users.type, artifact))
