"""Offline scoring with an artifact."""

import torchx.specs as specs


def py(*overrides: str, nproc: int = 1, max_restarts: int = 0) -> specs.AppDef:
    """Score users' histories with an exported artifact, or carry kept user states on by new events (mode=update).

    Reads parquet of user_id and history, a list of item ids (tools/write_histories.py makes it of a dataset), with candidates
    for mode=candidates; writes parquet. Rows that cannot be scored go to rejects/ with their reason. The same command again
    goes on where a killed job was. Input files that cannot be read are named, and the others scored (exit status 3 of the
    program).

    Args:
        overrides: artifact=DIR input=PARQUET output=DIR mode=candidates|top_k|encode|items|update|rank [state=DIR for update]
            [top_k=100] [exclude_seen=true] [empty_history=reject|popular]
            [allow=PARQUET] [deny=PARQUET] [deny_column=NAME] [catalog=whole|split] [index=exact|ivf|hnsw]
            [index.min_recall=0.95] [keep_columns=[NAME,...]] and other hydra overrides
        nproc: processes (ranks) on this machine; each scores its share of the input's files, with its share
            of the cores, or with OMP_NUM_THREADS threads where that is set
        max_restarts: times that all ranks are restarted, and go on, after a failure
    """
    from glintru_rec.programs.launcher import app

    return app("score", overrides, nproc, max_restarts, share_cores=True)


if __name__ == "__main__":
    from glintru_rec.programs.launcher import run
    from glintru_rec.programs.score import ScoreConfig, score_program

    run("score", ScoreConfig, score_program)
