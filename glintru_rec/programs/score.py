"""The program score."""

from pathlib import Path

from glintru_rec.programs.launcher import write_config
from glintru_rec.progress import Progress
from glintru_rec.scoring.job import ScoreConfig, score

__all__ = ["ScoreConfig", "score_program"]


def score_program(config: ScoreConfig) -> None:
    """Score a parquet input, and say what became of every row."""
    bar = Progress("score", 0, "rows")

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    report = score(config, update)
    write_config(config, Path(config.output) / "config.yaml")
    print(f"rows in {report.rows_in:,}, scored {report.rows_scored:,}, {report.rows_per_second:,.0f} rows/s")
    for reason, count in report.rows_set_aside.items():
        print(f"set aside: {reason} {count:,}")
    if report.unknown_history_items or report.unknown_candidates:
        print(f"unknown items: {report.unknown_history_items:,} in histories, {report.unknown_candidates:,} candidates")
    print(f"written: {config.output}")
