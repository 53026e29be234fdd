"""Train a sequence model."""

import torchx.specs as specs


def py(
    *overrides: str,
    nproc: int = 1,
    max_restarts: int = 0,
    nnodes: int = 1,
    max_retries: int = 0,
    cpu: int = 0,
    gpu: int = 0,
    memory_mb: int = 4096,
    image: str = "",
    mounts: str = "",
) -> specs.AppDef:
    """Train a sequence model on a dataset made by launch/prepare.py.

    Writes a run directory: resolved config, versions, checkpoints, metrics.jsonl, TensorBoard events.

    Args:
        overrides: data.path=DIR output=RUN_DIR [model=glint_ru|glint_ru_light|rec_grela|lru_rec|sasrec]
            [loss=sampled_softmax|full_softmax] [table=row_wise|table_wise|column_wise|auto|replicated] [experiment=NAME]
            [data.vocabulary=dense|dynamic] [trainer.max_epochs=N] [trainer.seed=N] and other hydra overrides;
            task=ranking trains a ranking model (data.path=DIR output=RUN_DIR [tower=none|mean|glint_ru|...]
            [tower.init_from=RUN_DIR])
        nproc: processes (ranks) on each machine
        max_restarts: times that all ranks are restarted, from the last checkpoint, after a failure
        nnodes: machines; all of them must see data.path and output
        max_retries: times that the scheduler starts the whole job anew, as after machines were taken away; needs
            trainer.resume=true
        cpu: cores that the scheduler is asked for on each machine (0: one for each process)
        gpu: GPUs that the scheduler is asked for on each machine
        memory_mb: memory that the scheduler is asked for on each machine, in MiB
        image: of the container, where the scheduler starts one (kubernetes)
        mounts: of the container, type=bind,src=PATH,dst=PATH[,readonly] or type=volume,src=CLAIM,dst=PATH; several one
            after the other, with commas between them (kubernetes)
    """
    from glintru_rec.programs.launcher import app

    if max_retries > 0 and "trainer.resume=true" not in overrides:
        raise ValueError(f"max_retries is {max_retries}: give trainer.resume=true, so that a retry goes on where the run was")
    return app("train", overrides, nproc, max_restarts, nnodes, max_retries, cpu, gpu, memory_mb, image, mounts)


if __name__ == "__main__":
    import sys

    from glintru_rec.programs.launcher import run, task_of

    if task_of(sys.argv[1:]) == "ranking":
        from glintru_rec.programs.train_ranking import RankingConfig, train_ranking

        run("train", RankingConfig, train_ranking, task="ranking")

    from glintru_rec.programs.train import TrainConfig, train

    run("train", TrainConfig, train)
