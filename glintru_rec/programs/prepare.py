"""The program prepare."""

from pathlib import Path

from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.programs.launcher import write_config

__all__ = ["PrepareConfig", "prepare_program"]


def prepare_program(config: PrepareConfig) -> None:
    """Make a dataset, and say what became of every row."""
    report = prepare(config, progress=lambda message: print(message, flush=True))
    write_config(config, Path(config.output) / "config.yaml")
    print(report)
