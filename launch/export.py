"""Artifact of a run."""

import torchx.specs as specs


def py(*overrides: str) -> specs.AppDef:
    """Export a run's best checkpoint to an artifact that loads with torch alone.

    Writes model.pt (or programs of pt2 or aoti), the item table, the vocabulary and a manifest.

    Args:
        overrides: checkpoint=RUN_DIR output=ARTIFACT_DIR format=torchscript|pt2|aoti precision=fp32|fp16|int8 and others
            (a run of task=ranking: torchscript in fp32, for mode=rank of launch/score.py)
    """
    from glintru_rec.programs.launcher import app

    return app("export", overrides)


if __name__ == "__main__":
    from glintru_rec.programs.export import ExportConfig, export_run
    from glintru_rec.programs.launcher import run

    run("export", ExportConfig, export_run)
