"""The offline scoring job: parquet of users in, parquet of scores out.

::

    part-00000.parquet                     one output file per input file, under the same name: user_id, and
                                           item_ids and scores (candidates, top_k), embedding (encode), or item_id and a
                                           column for each task (rank); items: item_id and embedding, 2^20 in a file
    rejects/part-00000.parquet             rows that could not be scored: user_id, reason, fragment, row (from 1)
    unknown_candidates/part-00000.parquet  candidates that the vocabulary lacks: user_id, item_id, fragment, row
    report.json                            what became of every row
    _SUCCESS                               written last, where every input file could be read
    .job/                                  what the same command, run again, goes on by (see `ledger`)

The two folders are made when there is something to put into them.

An output file is a function of its input file, the config and the artifact. So whatever kills a job, the same command again
does the files that are missing and ends with what an undisturbed job writes, whatever the number of threads (see `pipeline`);
only ``timing`` in ``report.json`` differs.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from glintru_rec.config import check
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.export.ranking_artifact import RankingArtifact
from glintru_rec.files import sha256_of, write_json, write_text
from glintru_rec.memory import FreedMemory
from glintru_rec.scoring.addresses import RemoteFolder, fetched, is_remote
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.examples import ExampleScorer
from glintru_rec.scoring.fragments import Fragment, find_inputs
from glintru_rec.scoring.index import IndexReport
from glintru_rec.scoring.ledger import Ledger, Record
from glintru_rec.scoring.pipeline import map_in_order, one_thread_each, read_ahead, timed
from glintru_rec.scoring.ranks import from_all, on_first, rank_and_size, share_out
from glintru_rec.scoring.remote_ledger import RemoteLedger
from glintru_rec.scoring.report import REPORT_FILE, STAGES, SUCCESS_FILE, Counts, ScoreReport, Timing
from glintru_rec.scoring.scorer import Scorer
from glintru_rec.scoring.writer import REJECTS_FOLDER, UNKNOWN_CANDIDATES_FOLDER, FragmentWriter

_NOT_TERMS = ("artifact", "input", "output", "catalog")


def score(config: ScoreConfig, progress: Callable[[int, int], None] | None = None) -> ScoreReport:
    """Score the users of a parquet input with an artifact, or go on with that.

    The batches in memory are bounded by the number of threads (see `pipeline`), not by the input, and what they freed goes
    back to the system (see `memory`). In a process group every
    rank calls this; each scores its share of the files, and the output is that of one process.

    Args:
        config: what to score, and how; for mode update there is `glintru_rec.scoring.update_states`.
        progress: called after every batch with the rows done and the rows there are, of this rank's share.

    Returns:
        The report, the same on all ranks, which is also written to ``report.json``. With ``failed`` input files there is no
        ``_SUCCESS``; the same call again tries them again. Where all was done before, nothing is written.

    Raises:
        InputError: the artifact or the output folder cannot be used, or no file of the input can; the output was begun with
            another config, artifact or input; another job is writing it; there are several ranks and a CUDA device.
    """
    check("mode", config.mode, config.mode != "update", "one that scores histories; for update, call update_states()")
    if not is_remote(config.output):
        return _score(config, Path(config.output), None, progress)
    with TemporaryDirectory(prefix="glintru_rec-") as folder:
        return _score(config, Path(folder), RemoteFolder(config.output), progress)


def _score(
    config: ScoreConfig, output: Path, remote: RemoteFolder | None, progress: Callable[[int, int], None] | None
) -> ScoreReport:
    """Score into a folder of this machine, from which all goes on to ``remote`` where there is one."""
    rank, num_ranks = rank_and_size()
    check("device", config.device, num_ranks == 1 or config.device == "cpu", "cpu, as there are several ranks")
    with ExitStack() as until_read:  # what an artifact has mapped into memory stays there when a copy is removed
        folder, allow, deny = (
            until_read.enter_context(fetched(key, getattr(config, key))) for key in ("artifact", "allow", "deny")
        )
        here = replace(config, artifact=folder, allow=allow, deny=deny)
        artifact = (RankingArtifact if here.mode == "rank" else Artifact).load(here.artifact, here.device)
        scorer = ExampleScorer(here, artifact) if isinstance(artifact, RankingArtifact) else Scorer(here, artifact)
        terms = _terms(here, artifact)
    catalog = scorer.item_fragments() if isinstance(scorer, Scorer) and config.mode == "items" else {}
    files = [part.file for part in catalog.values()] or find_inputs(config.input)
    ledger = RemoteLedger(remote, output, terms, files) if remote else Ledger(output, terms, files)
    on_first(ledger.check)  # before the output is touched, and again when no other job can be there
    opened: dict[str, Fragment | InputError] = {**catalog} or scorer.open(files)
    index = None
    if config.index.kind != "exact" and isinstance(scorer, Scorer):
        is_done = on_first(lambda: (output / SUCCESS_FILE).exists() and len(ledger.done()) == len(files))
        index = None if is_done else scorer.prepare([each for each in opened.values() if isinstance(each, Fragment)])
    with ExitStack() as until_the_end:

        def begin() -> tuple[dict[str, Record], list[list[str]]]:
            """Give what was done before, and every rank's share of the rest."""
            until_the_end.enter_context(ledger.locked())
            before = ledger.done()
            missing = {name: _num_rows(opened[name]) for name in opened if name not in before}
            if missing:
                ledger.remove(SUCCESS_FILE)
            ledger.remove_leftovers(missing)
            return before, share_out(missing, num_ranks)

        before, shares = on_first(begin)
        give_back_freed = FreedMemory()
        rows_done, total = 0, sum(_num_rows(opened[name]) for name in shares[rank])

        def show(num_rows: int) -> None:
            nonlocal rows_done
            rows_done += num_rows
            give_back_freed()
            if progress is not None:
                progress(rows_done, total)

        start = time.perf_counter()
        stamps = {file.name: file.stamp for file in files}
        own: dict[str, Record] = {}
        with one_thread_each(config.device) as num_threads:
            for name in shares[rank]:
                try:
                    own[name] = _score_fragment(opened[name], output, scorer, num_threads, show)
                except InputError as error:
                    own[name] = Record(stamps[name], error=str(error))
                ledger.write(name, own[name])
            if isinstance(scorer, Scorer):
                scorer.finish()
        now = {name: record for share in from_all(own) for name, record in share.items()}
        report = _report(before, now, time.perf_counter() - start, scorer.unknown_listed_items, index)

        def finish() -> None:
            """Write the report, unless a job before this one has ended well."""
            if now or not (output / SUCCESS_FILE).exists():
                written: dict[str, Any] = {**asdict(report), "config": asdict(config), "model": artifact.manifest["provenance"]}
                write_json(output / REPORT_FILE, written)
                ledger.publish(REPORT_FILE)
                if not report.failed:
                    write_text(output / SUCCESS_FILE, "")
                    ledger.publish(SUCCESS_FILE)

        on_first(finish)
    return report


def _terms(config: ScoreConfig, artifact: Artifact | RankingArtifact) -> dict[str, Any]:
    """Tell what an output depends on besides the input files; wherever they and the artifact lie."""
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_TERMS}
    settings["index"] = config.index.of_output()
    for key in ("allow", "deny"):
        if settings[key]:
            settings[key] = sha256_of(Path(settings[key]))[:16]
    return settings | {f"{name} of the artifact": sha256[:16] for name, sha256 in artifact.manifest["files"].items()}


def _num_rows(fragment: Fragment | InputError) -> int:
    return fragment.num_rows if isinstance(fragment, Fragment) else 0


def _score_fragment(
    fragment: Fragment | InputError,
    output: Path,
    scorer: Scorer | ExampleScorer,
    num_threads: int,
    show: Callable[[int], None],
) -> Record:
    """Write all files of one fragment, or raise the `InputError` that tells why it cannot be read."""
    if isinstance(fragment, InputError):
        raise fragment
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    def read() -> Iterator[Any]:  # Rows or Examples: a scorer scores what it reads
        batches = scorer.read(fragment)
        while True:
            with timed(seconds, "read"):
                rows = next(batches, None)
            if rows is None:
                return
            yield rows

    def scored(rows: Any) -> tuple[Any, pa.Table]:
        with timed(seconds, "score"):
            return rows, scorer.score(rows)

    counts = Counts()
    schema = pa.schema([*scorer.schema(fragment.user_type), *fragment.kept])
    with FragmentWriter(output, fragment.file.name, schema) as files:
        for rows, table in map_in_order(scored, read_ahead(read()), num_threads):
            with timed(seconds, "write"):
                files.write_scores(table)
                files.write_beside(REJECTS_FOLDER, rows.set_aside)
                files.write_beside(UNKNOWN_CANDIDATES_FOLDER, rows.unknown_candidates)
            counts += Counts(
                rows_in=rows.num_read,
                rows_scored=len(table),
                rows_set_aside=Counter(rows.set_aside["reason"].to_pylist()),
                fallback=rows.num_fallback,
                unknown_history_items=rows.unknown_history_items,
                unknown_candidates=len(rows.unknown_candidates),
            )
            show(rows.num_read)
        assert counts.rows_in == fragment.num_rows == counts.rows_scored + sum(counts.rows_set_aside.values())
        closing = time.perf_counter()
    seconds["write"] += time.perf_counter() - closing  # much of it happens at the end of the context
    return Record(fragment.file.stamp, files=files.sizes(), counts=counts, timing=seconds)


def _report(
    before: dict[str, Record], now: dict[str, Record], elapsed: float, unknown_listed: int, index: IndexReport | None
) -> ScoreReport:
    """Sum up all fragments: those of earlier calls, and those that took ``elapsed`` seconds now."""
    failed = {name: record.error for name, record in now.items() if record.error}
    records = {name: record for name, record in (before | now).items() if not record.error}
    counts = sum((record.counts for record in records.values()), Counts())
    assert counts.rows_in == counts.rows_scored + sum(counts.rows_set_aside.values())
    rows_now = sum(record.counts.rows_in for record in now.values())
    timing = Timing(
        seconds={stage: round(sum(record.timing.get(stage, 0.0) for record in records.values()), 3) for stage in STAGES},
        elapsed=round(elapsed, 3),
        rows_per_second=round(rows_now / max(elapsed, 1e-9), 1),
        fragments_before=len(before),
        fragments_now=len(records) - len(before),
    )
    return ScoreReport(
        **asdict(counts),
        unknown_listed_items=unknown_listed,
        fragments=len(before | now),
        failed=failed,
        timing=timing,
        index=index,
    )
