"""The program score."""

import sys
from collections.abc import Callable
from pathlib import Path

from glintru_rec.programs.launcher import write_config
from glintru_rec.progress import Progress
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.job import score
from glintru_rec.scoring.update import update_states

__all__ = ["ScoreConfig", "score_program"]

UNREADABLE_INPUT = 3


def score_program(config: ScoreConfig) -> int:
    """Score a parquet input or update user states, say what became of every row, and give the exit status."""
    bar = Progress(config.mode if config.mode == "update" else "score", 0, "users" if config.mode == "update" else "rows")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    status = _update(config, show) if config.mode == "update" else _score(config, show)
    print(f"written: {config.output}")
    return status


def _score(config: ScoreConfig, show: Callable[[int, int], None]) -> int:
    report = score(config, show)
    resolved = Path(config.output) / "config.yaml"
    if not resolved.exists():
        write_config(config, resolved)
    timing = report.timing
    if timing.fragments_before:
        print(f"files done before {timing.fragments_before:,}, now {timing.fragments_now:,}")
    if not timing.fragments_now and not report.failed:
        print("nothing was left to score")
    seconds = ", ".join(f"{stage} {value:,.1f} s" for stage, value in timing.seconds.items())
    print(f"rows in {report.rows_in:,}, scored {report.rows_scored:,}, {timing.rows_per_second:,.0f} rows/s ({seconds})")
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.fallback:
        print(f"scored by popularity, for want of a history: {report.fallback:,}")
    if report.unknown_history_items or report.unknown_candidates:
        print(f"unknown items: {report.unknown_history_items:,} in histories, {report.unknown_candidates:,} candidates")
    for why in report.failed.values():
        print(f"error: {why}", file=sys.stderr, flush=True)
    if not report.failed:
        return 0
    print(
        f"error: {len(report.failed)} of {report.fragments} input file(s) could not be read; the others are scored. Mend them "
        f"and run the same command again",
        file=sys.stderr,
        flush=True,
    )
    return UNREADABLE_INPUT


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
