"""The program score."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from glintru_rec.config import check
from glintru_rec.programs.launcher import write_config
from glintru_rec.progress import Progress
from glintru_rec.scoring.addresses import is_remote
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.job import score
from glintru_rec.scoring.ranks import rank_and_size
from glintru_rec.scoring.update import update_states
from glintru_rec.training.processes import process_group, quiet_dependencies

__all__ = ["ScoreConfig", "score_program"]

UNREADABLE_INPUT = 3
# Ranks whose files are done wait for the one with the largest, in silence. One that dies is noticed by torchrun, not by this.
TIMEOUT_SECONDS = 30 * 24 * 3600.0


def score_program(config: ScoreConfig) -> int:
    """Score a parquet input or update user states, say what became of every row, and give the exit status.

    Under torchrun its ranks share the input's files out; the first one speaks.
    """
    quiet_dependencies()
    with process_group("cpu", TIMEOUT_SECONDS) if "RANK" in os.environ else nullcontext():
        return _run(config)


def _run(config: ScoreConfig) -> int:
    rank, num_ranks = rank_and_size()
    check("mode", config.mode, num_ranks == 1 or config.mode != "update", "another one, as update runs in one process")
    label, unit = ("update", "users") if config.mode == "update" else ("score", "rows")
    bar = Progress(label, 0, unit, enabled=rank == 0)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    status = _update(config, show) if config.mode == "update" else _score(config, show)
    if rank == 0:
        print(f"written: {config.output}")
    return status


def _score(config: ScoreConfig, show: Callable[[int, int], None]) -> int:
    report = score(config, show)
    status = UNREADABLE_INPUT if report.failed else 0
    if rank_and_size()[0] > 0:
        return status
    resolved = Path(config.output) / "config.yaml"
    if not is_remote(config.output) and not resolved.exists():  # elsewhere, the report has it
        write_config(config, resolved)
    timing = report.timing
    if timing.fragments_before:
        print(f"files done before {timing.fragments_before:,}, now {timing.fragments_now:,}")
    if not timing.fragments_now and not report.failed:
        print("nothing was left to score")
    seconds = ", ".join(f"{stage} {value:,.1f} s" for stage, value in timing.seconds.items())
    print(
        f"rows in {report.rows_in:,}, scored {report.rows_scored:,}, {timing.rows_per_second:,.0f} rows/s (at work: {seconds})"
    )
    if report.index:
        index, recall = report.index, "unknown" if report.index.recall is None else f"{report.index.recall:.4f}"
        print(
            f"index {index.kind}: recall@{config.top_k} {recall} against exact search, of {index.users:,} users; "
            f"{index.searched_exactly:,} of them searched exactly"
        )
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.fallback:
        print(f"scored by popularity, for want of a history: {report.fallback:,}")
    if report.unknown_history_items or report.unknown_candidates:
        print(f"unknown items: {report.unknown_history_items:,} in histories, {report.unknown_candidates:,} candidates")
    if report.unknown_listed_items:
        print(f"unknown items in allow and deny: {report.unknown_listed_items:,}")
    for why in report.failed.values():
        print(f"error: {why}", file=sys.stderr, flush=True)
    if report.failed:
        print(
            f"error: {len(report.failed)} of {report.fragments} input file(s) could not be read; the others are scored. Mend "
            f"them and run the same command again",
            file=sys.stderr,
            flush=True,
        )
    return status


def _update(config: ScoreConfig, show: Callable[[int, int], None]) -> int:
    report = update_states(config, show)
    write_config(config, Path(config.output) / "config.yaml")
    print(f"rows in {report.rows_in:,}, applied {report.events_applied:,}, {report.rows_per_second:,.0f} rows/s")
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.unknown_items:
        print(f"unknown items: {report.unknown_items:,}")
    print(f"users updated {report.users_updated:,}, in {config.state} {report.users_in_store:,}")
    return 0
