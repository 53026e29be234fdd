"""Interaction log to sequence dataset."""

import torchx.specs as specs


def py(*overrides: str) -> specs.AppDef:
    """Make a sequence dataset from an interaction log.

    Reads parquet, csv, RecBole .inter and MovieLens ratings.dat, recognised by content.

    Args:
        overrides: input=FILE|GLOB output=DIR [user_column=user_id] [item_column=item_id] [time_column=timestamp]
            [side_columns=[NAME,...]] [ids=raw] [base=DATASET] [min_user_events=5] [min_item_events=5] [engine=duckdb|spark]
            and other hydra overrides; or
            task=ranking events=FILE [users=FILE] [items=FILE] features=NAME output=DIR for a ranking model's dataset
    """
    from glintru_rec.programs.launcher import app

    return app("prepare", overrides)


if __name__ == "__main__":
    import sys

    from glintru_rec.programs.launcher import run, task_of

    if task_of(sys.argv[1:]) == "ranking":
        from glintru_rec.programs.prepare_ranking import PrepareRankingConfig, prepare_ranking_program

        run("prepare", PrepareRankingConfig, prepare_ranking_program, task="ranking")

    from glintru_rec.programs.prepare import PrepareConfig, prepare_program

    run("prepare", PrepareConfig, prepare_program)
