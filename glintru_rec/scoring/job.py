"""The offline scoring job: parquet of users in, parquet of scores out.

::

    part-00000.parquet                     one output file per input file, under the same name: user_id, and
                                           item_ids and scores (candidates, top_k) or embedding (encode)
    rejects/part-00000.parquet             rows that could not be scored: user_id, reason, fragment, row (from 1)
    unknown_candidates/part-00000.parquet  candidates that the vocabulary lacks: user_id, item_id, fragment, row
    report.json                            what became of every row
    _SUCCESS                               written last, where every input file could be read
    .job/                                  what the same command, run again, goes on by (see `ledger`)

The two folders are made when there is something to put into them.

An output file is a function of its input file, the config and the artifact. So whatever kills a job, the same command again
does the files that are missing and ends with what an undisturbed job writes; only ``timing`` in ``report.json`` differs,
and with more than one thread the last digits of scores.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glintru_rec.config import check
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.files import write_json, write_text
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.fragments import Fragment, find_inputs, open_fragments
from glintru_rec.scoring.ledger import Ledger, Record
from glintru_rec.scoring.report import REPORT_FILE, STAGES, SUCCESS_FILE, Counts, ScoreReport, Stopwatch, Timing
from glintru_rec.scoring.rows import Columns
from glintru_rec.scoring.scorer import Scorer
from glintru_rec.scoring.writer import REJECTS_FOLDER, UNKNOWN_CANDIDATES_FOLDER, FragmentWriter


def score(config: ScoreConfig, progress: Callable[[int, int], None] | None = None) -> ScoreReport:
    """Score the users of a parquet input with an artifact, or go on with that.

    Memory is bounded by ``batch_size``, not by the input.

    Args:
        config: what to score, and how; for mode update there is `glintru_rec.scoring.update_states`.
        progress: called after every batch with the rows done and the rows there are.

    Returns:
        The report, which is also written to ``report.json``. With ``failed`` input files there is no ``_SUCCESS``; the same
        call again tries them again. Where all was done before, nothing is written.

    Raises:
        InputError: the artifact or the output folder cannot be used, or no file of the input can; the output was begun with
            another config, artifact or input; another job is writing it.
    """
    check("mode", config.mode, config.mode != "update", "one that scores histories; for update, call update_states()")
    output = Path(config.output)
    artifact = Artifact.load(config.artifact, config.device)
    files = find_inputs(config.input)
    ledger = Ledger(output, _terms(config, artifact), files)
    ledger.check()  # before the output is touched, and again when no other job can be there
    candidates_column = config.candidates_column if config.mode == "candidates" else None
    columns = Columns(config.user_column, config.history_column, candidates_column)
    opened = open_fragments(files, columns, artifact.vocabulary)
    scorer = Scorer(config, artifact)
    with ledger.locked():
        before = ledger.done()
        missing = {file.name: opened[file.name] for file in files if file.name not in before}
        if not missing and (output / SUCCESS_FILE).exists():
            ledger.remove_leftovers(())  # of a job killed after its last file
            return _report(before, {}, num_before=len(before))
        (output / SUCCESS_FILE).unlink(missing_ok=True)
        ledger.remove_leftovers(missing)
        rows_done = sum(record.counts.rows_in for record in before.values())
        total = rows_done + sum(fragment.num_rows for fragment in missing.values() if isinstance(fragment, Fragment))

        def show(num_rows: int) -> None:
            nonlocal rows_done
            rows_done += num_rows
            if progress is not None:
                progress(rows_done, total)

        records, failed = dict(before), {}
        for file in files:
            if file.name in before:
                continue
            try:
                record = _score_fragment(missing[file.name], output, config, artifact, scorer, show)
                records[file.name] = record
            except InputError as error:
                failed[file.name] = str(error)
                record = Record(file.stamp, error=str(error))
            ledger.write(file.name, record)
        report = _report(records, failed, num_before=len(before))
        written: dict[str, Any] = {**asdict(report), "config": asdict(config), "model": artifact.manifest["provenance"]}
        write_json(output / REPORT_FILE, written)
        if not failed:
            write_text(output / SUCCESS_FILE, "")
    return report


def _terms(config: ScoreConfig, artifact: Artifact) -> dict[str, Any]:
    """Tell what an output depends on besides the input files; wherever they and the artifact lie."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("artifact", "input", "output")}
    return settings | {f"{name} of the artifact": sha256[:16] for name, sha256 in artifact.manifest["files"].items()}


def _score_fragment(
    fragment: Fragment | InputError,
    output: Path,
    config: ScoreConfig,
    artifact: Artifact,
    scorer: Scorer,
    show: Callable[[int], None],
) -> Record:
    """Write all files of one fragment, or raise the `InputError` that tells why it cannot be read."""
    if isinstance(fragment, InputError):
        raise fragment
    counts, watch = Counts(), Stopwatch()
    with FragmentWriter(output, fragment.file.name, scorer.schema(fragment.user_type)) as files:
        batches = fragment.read(config.batch_size, artifact.vocabulary, config.empty_history == "popular")
        while True:
            rows = next(batches, None)
            watch.lap("read")
            if rows is None:
                break
            scored = scorer.score(rows)
            watch.lap("score")
            files.write_scores(scored)
            files.write_beside(REJECTS_FOLDER, rows.set_aside)
            files.write_beside(UNKNOWN_CANDIDATES_FOLDER, rows.unknown_candidates)
            counts += Counts(
                rows_in=rows.num_read,
                rows_scored=len(scored),
                rows_set_aside=Counter(rows.set_aside["reason"].to_pylist()),
                fallback=int((rows.history.lengths == 0).sum()),
                unknown_history_items=rows.unknown_history_items,
                unknown_candidates=len(rows.unknown_candidates),
            )
            show(rows.num_read)
            watch.lap("write")
        assert counts.rows_in == fragment.num_rows == counts.rows_scored + sum(counts.rows_set_aside.values())
    watch.lap("write")  # much of it happens at the end of the context
    return Record(fragment.file.stamp, files=files.sizes(), counts=counts, timing=watch.seconds)


def _report(records: dict[str, Record], failed: dict[str, str], num_before: int) -> ScoreReport:
    """Sum up all fragments, those of earlier calls too."""
    counts = sum((record.counts for record in records.values()), Counts())
    assert counts.rows_in == counts.rows_scored + sum(counts.rows_set_aside.values())
    seconds = {stage: sum(record.timing.get(stage, 0.0) for record in records.values()) for stage in STAGES}
    timing = Timing(
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        rows_per_second=round(counts.rows_in / max(sum(seconds.values()), 1e-9), 1),
        fragments_before=num_before,
        fragments_now=len(records) - num_before,
    )
    return ScoreReport(**asdict(counts), fragments=len(records) + len(failed), failed=failed, timing=timing)
