"""The update of user states: parquet of new events in, the best items of the users who acted out (``mode=update``).

The store keeps one state per user (see `state_store`); an update carries it on by the user's new events, in time order, so its
cost does not depend on the length of any history. The same events in any number of updates give what one update of all of them
gives, and what scoring the whole history afresh gives. Two things to know about "afresh":

* a state knows the whole history, while an artifact's ``encode`` sees its last ``max_seq_len`` items: they agree on histories
  that are no longer;
* times never go back. An event older than the newest one applied to its user comes too late to take its place: it is set
  aside as ``late_event``. At the very time of the newest, it is applied, after those before it, unless that item was applied at
  that time already: then it is a ``duplicate_event``, as it is for `prepare`. So inputs may overlap, and none counts twice.

An event whose item the vocabulary lacks is skipped and counted, and does not move its user's time. A user all of whose events
were skipped or set aside did not act.

::

    part-00000.parquet           user_id, item_ids, scores: the users who acted, in ascending order
    rejects/part-00000.parquet   rows that were not applied: user_id, item_id, timestamp, reason, fragment, row (from 1)
    report.json                  what became of every row
    _SUCCESS                     always there: the folder appears whole or not at all

Whatever kills an update, the same command again ends as if it had never been killed. The order is: the output is complete
aside and on the disk; the store commits all changes at once, and with them where that output lies; the output takes its name.
Before the commit nothing has happened; after it, the next update of the store (this one again, or another) first gives the
output its name. The newest update repeated after it was complete, with the same input and output, changes nothing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from glintru_rec.data.formats import LogColumns, LogFile
from glintru_rec.data.scratch import scratch_database
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.files import check_free, make_aside, publish, sha256_of, sync, write_json, write_text
from glintru_rec.scoring.addresses import fetched, fetched_files
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.events import EventBatch, Events, open_events
from glintru_rec.scoring.report import REPORT_FILE, SUCCESS_FILE
from glintru_rec.scoring.rows import Ragged
from glintru_rec.scoring.scorer import ranked_schema, ranked_table
from glintru_rec.scoring.state_store import StateStore, UserStates
from glintru_rec.scoring.writer import REJECTS_FOLDER, FragmentWriter

OUTPUT_FILE = "part-00000.parquet"


@dataclass(frozen=True)
class UpdateReport:
    """What became of every row: ``rows_in`` = ``events_applied`` + the sum of ``rows_set_aside`` + ``unknown_items``.

    Attributes:
        rows_in: rows read.
        events_applied: events that users' states took in.
        rows_set_aside: rows that could not be used, by reason; `late_event` and `duplicate_event` among them.
        unknown_items: events skipped because the vocabulary lacks their item.
        users_updated: users who acted: the rows of the output.
        users_in_store: users who have a state.
        seconds: from the start to the last file.
        rows_per_second: rows read per second.
    """

    rows_in: int
    events_applied: int
    rows_set_aside: dict[str, int]
    unknown_items: int
    users_updated: int
    users_in_store: int
    seconds: float
    rows_per_second: float


def update_states(config: ScoreConfig, progress: Callable[[int, int], None] | None = None) -> UpdateReport:
    """Carry the states of users on by new events, and find the best items of those who acted.

    Memory is bounded by ``batch_size`` users and their new events, not by the input or the store.

    Args:
        config: what to apply, and to which store.
        progress: called after every batch with the users done and the users there are.

    Returns:
        The report, which is also written to ``report.json``.

    Raises:
        InputError: the artifact, its encoder, the input, the store or the output folder cannot be used. Nothing has
            changed then.
    """
    with fetched("artifact", config.artifact) as folder, fetched_files(config.input) as (location, addresses):
        return _update(config, Artifact.load(folder, config.device), location, addresses, progress)


def _update(
    config: ScoreConfig,
    artifact: Artifact,
    location: str,
    addresses: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> UpdateReport:
    """Apply the files at a path of this machine, of which ``addresses`` says what they are copies of."""
    start = time.monotonic()
    output = Path(config.output).absolute()
    _check_recurrent(artifact)
    columns = LogColumns(config.user_column, config.item_column, config.time_column, tuple(artifact.side.names))
    files = open_events(location, columns)
    identity = _identity(config, columns, files)
    with StateStore(Path(config.state), artifact.fingerprint) as store:
        if store.finish_last_update() == (identity, output) and (output / SUCCESS_FILE).exists():
            written = json.loads((output / REPORT_FILE).read_text())
            return UpdateReport(**{name: written[name] for name in UpdateReport.__dataclass_fields__})
        check_free("output", output)
        aside = make_aside(output)
        try:
            report = _fill(aside, files, addresses, columns, store, artifact, config, progress, start)
            sync(aside)
            store.commit(identity, output, aside)
        except BaseException:
            if store.undo(aside):
                shutil.rmtree(aside, ignore_errors=True)
            raise
        publish(aside, output)
    return report


def _check_recurrent(artifact: Artifact) -> None:
    methods = artifact.manifest["signature"]
    if "top_k_of" not in methods:
        raise InputError(f"artifact {str(artifact.path)!r} is of a version without states; export it again for mode=update")
    if "advance" not in methods:
        name = artifact.manifest["encoder"].get("encoder", "its encoder")
        raise InputError(
            f"mode=update needs an encoder with a recurrent form: {name} of artifact {str(artifact.path)!r} has none, like "
            f"SASRec and every bidirectional encoder; score whole histories with mode=top_k"
        )


def _identity(config: ScoreConfig, columns: LogColumns, files: list[LogFile]) -> str:
    """Tell an update from all others, wherever its files lie."""
    contents = [sha256_of(file.path) for file in files]
    settings = [tuple(columns), config.top_k, config.exclude_seen]
    return hashlib.sha256(json.dumps([contents, settings]).encode()).hexdigest()


def _fill(
    aside: Path,
    files: list[LogFile],
    addresses: dict[str, str],
    columns: LogColumns,
    store: StateStore,
    artifact: Artifact,
    config: ScoreConfig,
    progress: Callable[[int, int], None] | None,
    start: float,
) -> UpdateReport:
    """Apply the events to the store, uncommitted, and write the whole output."""
    events_applied = users_updated = unknown_items = users_done = 0
    with scratch_database(aside / ".work") as db:
        events = Events(db, files, columns, artifact.vocabulary)
        store.use(events.user_type, events.time_unit)
        schema = ranked_schema(pa.int64() if events.user_type == "int64" else pa.string(), artifact)
        with FragmentWriter(aside, OUTPUT_FILE, schema) as written:
            for batch in events.batches(config.batch_size):
                applied = _apply(batch, store, artifact, config)
                written.write_scores(applied.ranked.cast(schema))
                events.set_aside(batch.positions[applied.late], "late_event")
                events.set_aside(batch.positions[applied.repeated], "duplicate_event")
                events_applied += applied.num_applied
                unknown_items += applied.num_unknown
                users_updated += len(applied.ranked)
                users_done += len(batch.users)
                if progress is not None:
                    progress(users_done, events.num_users)
            for rejected in events.rows_set_aside():
                fragments = pa.array([addresses.get(path, path) for path in rejected["fragment"].to_pylist()], pa.string())
                place = rejected.schema.get_field_index("fragment")
                written.write_beside(REJECTS_FOLDER, rejected.set_column(place, "fragment", fragments))
        set_aside = events.counts_set_aside()
        num_rows = events.num_rows
    assert num_rows == events_applied + unknown_items + set_aside.total()
    seconds = time.monotonic() - start
    report = UpdateReport(
        rows_in=num_rows,
        events_applied=events_applied,
        rows_set_aside=dict(sorted(set_aside.items())),
        unknown_items=unknown_items,
        users_updated=users_updated,
        users_in_store=store.num_users(),
        seconds=round(seconds, 3),
        rows_per_second=round(num_rows / seconds, 1),
    )
    write_json(aside / REPORT_FILE, {**asdict(report), "config": asdict(config), "model": artifact.manifest["provenance"]})
    write_text(aside / SUCCESS_FILE, "")
    return report


class _Applied(NamedTuple):
    """What became of a batch of T events."""

    ranked: pa.Table
    """user_id, item_ids, scores of the users who acted."""
    late: np.ndarray
    """bool ``[T]``."""
    repeated: np.ndarray
    """bool ``[T]``."""
    num_applied: int
    num_unknown: int


@torch.inference_mode()
def _apply(batch: EventBatch, store: StateStore, artifact: Artifact, config: ScoreConfig) -> _Applied:
    """Carry the states of a batch's users on, write them to the store, and rank the catalog for those who acted."""
    module, num_users = artifact.module, len(batch.users)
    pairs = _Pairs(artifact.vocabulary.num_items)
    before = store.read(batch.users.to_pylist(), module.init_state(1)[0].cpu().numpy())
    indices = artifact.vocabulary.encode(batch.items)
    is_known = indices >= 0
    late = is_known & (batch.times < before.last_time[batch.rows])
    at_last = is_known & (batch.times == before.last_time[batch.rows])
    repeated = at_last & np.isin(pairs.join(batch.rows, indices), pairs.of(before.last_items))
    applies = is_known & ~late & ~repeated

    rows, indices, times = batch.rows[applies], indices[applies], batch.times[applies]
    lengths = np.bincount(rows, minlength=num_users)
    acted = np.flatnonzero(lengths)
    last_time = before.last_time.copy()
    np.maximum.at(last_time, rows, times)
    new = pairs.join(rows, indices)
    still_last = pairs.of(before.last_items)[np.repeat(last_time == before.last_time, before.last_items.lengths)]
    after_seen = pairs.ragged(np.union1d(pairs.of(before.seen), new), num_users)
    after_last = pairs.ragged(np.union1d(still_last, new[times == last_time[rows]]), num_users)
    seen = _select(after_seen, acted)

    inputs = [indices, lengths[acted], before.state[acted]]
    if artifact.side.names:
        side_ids = [artifact.side.encode(name, values) for name, values in zip(artifact.side.names, batch.side)]
        inputs.append(np.stack(side_ids, axis=1)[applies])
    query, state = module.advance(*(torch.from_numpy(array).to(config.device) for array in inputs))
    users = batch.users.take(pa.array(acted))
    after = UserStates(
        state.cpu().numpy(), last_time[acted], (before.num_events + lengths)[acted], seen, _select(after_last, acted)
    )
    store.write(users.to_pylist(), after)
    hidden = seen if config.exclude_seen else Ragged(seen.indices[:0], np.zeros_like(seen.lengths))
    k = min(config.top_k, artifact.vocabulary.num_items)
    ids, scores = module.top_k_of(query, *(torch.from_numpy(array).to(config.device) for array in hidden), k)
    ranked = ranked_table(users, ids, scores, artifact)
    return _Applied(ranked, late, repeated, len(rows), int((~is_known).sum()))


class _Pairs:
    """A user's row and an item as one number, so that sets of both are sets of numbers that sort by row, then item."""

    def __init__(self, num_items: int):
        self._num_items = max(1, num_items)

    def join(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return rows * self._num_items + indices

    def of(self, ragged: Ragged) -> np.ndarray:
        return self.join(np.repeat(np.arange(len(ragged.lengths)), ragged.lengths), ragged.indices)

    def ragged(self, pairs: np.ndarray, num_rows: int) -> Ragged:
        rows, indices = np.divmod(pairs, self._num_items)
        return Ragged(indices, np.bincount(rows, minlength=num_rows))


def _select(ragged: Ragged, rows: np.ndarray) -> Ragged:
    """Keep some rows, ascending, of a ragged array."""
    keep = np.zeros(len(ragged.lengths), dtype=bool)
    keep[rows] = True
    return Ragged(ragged.indices[np.repeat(keep, ragged.lengths)], ragged.lengths[rows])
