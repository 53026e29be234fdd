"""Use a model offline: score users in bulk with an artifact; evaluate a run (which needs torchrec, scoring does not)."""

from glintru_rec.scoring.job import MODES, ScoreConfig, ScoreReport, score

__all__ = ["MODES", "ScoreConfig", "ScoreReport", "score"]
