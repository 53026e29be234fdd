"""The program score."""

from collections.abc import Callable
from pathlib import Path

from glintru_rec.programs.launcher import write_config
from glintru_rec.progress import Progress
from glintru_rec.scoring.job import ScoreConfig, score
from glintru_rec.scoring.update import update_states

__all__ = ["ScoreConfig", "score_program"]


def score_program(config: ScoreConfig) -> None:
    """Score a parquet input or update user states, and say what became of every row."""
    bar = Progress(config.mode if config.mode == "update" else "score", 0, "users" if config.mode == "update" else "rows")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    if config.mode == "update":
        _update(config, show)
    else:
        _score(config, show)
    print(f"written: {config.output}")


def _score(config: ScoreConfig, show: Callable[[int, int], None]) -> None:
    report = score(config, show)
    write_config(config, Path(config.output) / "config.yaml")
    print(f"rows in {report.rows_in:,}, scored {report.rows_scored:,}, {report.rows_per_second:,.0f} rows/s")
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.unknown_history_items or report.unknown_candidates:
        print(f"unknown items: {report.unknown_history_items:,} in histories, {report.unknown_candidates:,} candidates")


def _update(config: ScoreConfig, show: Callable[[int, int], None]) -> None:
    report = update_states(config, show)
    write_config(config, Path(config.output) / "config.yaml")
    print(f"rows in {report.rows_in:,}, applied {report.events_applied:,}, {report.rows_per_second:,.0f} rows/s")
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.unknown_items:
        print(f"unknown items: {report.unknown_items:,}")
    print(f"users updated {report.users_updated:,}, in {config.state} {report.users_in_store:,}")
