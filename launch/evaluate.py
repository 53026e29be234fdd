"""Ranking metrics of a run."""

import torchx.specs as specs


def py(*overrides: str, nproc: int = 1) -> specs.AppDef:
    """Evaluate a run's best checkpoint over the whole catalog.

    Writes the protocol and the metrics as JSON.

    Args:
        overrides: checkpoint=RUN_DIR data.path=DIR output=FILE [split=test|valid] [candidates=full|uniform:N|popularity:N]
            and other hydra overrides
        nproc: processes (ranks) on this machine
    """
    from glintru_rec.programs.launcher import app

    return app("evaluate", overrides, nproc)


if __name__ == "__main__":
    from glintru_rec.programs.evaluate import EvaluateConfig, evaluate_run
    from glintru_rec.programs.launcher import run

    run("evaluate", EvaluateConfig, evaluate_run)
