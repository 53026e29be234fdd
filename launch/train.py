"""Train a sequence model."""

import torchx.specs as specs


def py(*overrides: str, nproc: int = 1, max_restarts: int = 0) -> specs.AppDef:
    """Train a sequence model on a dataset made by launch/prepare.py.

    Writes a run directory: resolved config, versions, checkpoints, metrics.jsonl, TensorBoard events.

    Args:
        overrides: data.path=DIR output=RUN_DIR [model=glint_ru|glint_ru_light|rec_grela|lru_rec|sasrec]
            [loss=sampled_softmax|full_softmax] [table=row_wise|replicated] [experiment=NAME]
            [trainer.max_epochs=N] [trainer.seed=N] and other hydra overrides
        nproc: processes (ranks) on this machine
        max_restarts: times that all ranks are restarted, from the last checkpoint, after a failure
    """
    from glintru_rec.programs.launcher import app

    return app("train", overrides, nproc, max_restarts)


if __name__ == "__main__":
    from glintru_rec.programs.launcher import run
    from glintru_rec.programs.train import TrainConfig, train

    run("train", TrainConfig, train)
