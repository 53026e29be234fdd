"""The program prepare, with ``task=ranking``."""

from pathlib import Path

from glintru_rec.programs.launcher import write_config
from glintru_rec.ranking.prepare import PrepareRankingConfig, prepare_ranking

__all__ = ["PrepareRankingConfig", "prepare_ranking_program"]


def prepare_ranking_program(config: PrepareRankingConfig) -> None:
    """Make a ranking dataset, and say what is in it."""
    manifest = prepare_ranking(config)
    write_config(config, Path(config.output) / "config.yaml")
    events = ", ".join(f"{name} {count:,}" for name, count in manifest["events"].items())
    print(f"users {manifest['num_users']:,}, events: {events}")
    for reason, count in manifest["set_aside"].items():
        if count:
            print(f"set aside: {reason} {count:,}")
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in manifest["num_embeddings"].items())
    print(f"rows of tables: {sizes}")
    print(f"tasks: {', '.join(f'{name} ({kind})' for name, kind in manifest['tasks'].items())}")
    print(f"written: {config.output}")
