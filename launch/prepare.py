"""Interaction log to sequence dataset."""

import torchx.specs as specs


def py(*overrides: str) -> specs.AppDef:
    """Make a sequence dataset from an interaction log.

    Reads parquet, csv, RecBole .inter and MovieLens ratings.dat, recognised by content.

    Args:
        overrides: input=FILE|GLOB output=DIR [min_user_events=5] [min_item_events=5] and other hydra overrides
    """
    from glintru_rec.programs.launcher import app

    return app("prepare", overrides)


if __name__ == "__main__":
    from glintru_rec.programs.launcher import run
    from glintru_rec.programs.prepare import PrepareConfig, prepare_program

    run("prepare", PrepareConfig, prepare_program)
