"""Use a model offline: score users in bulk with an artifact; evaluate a run (which needs torchrec, scoring does not)."""

from glintru_rec.scoring.config import MODES, ScoreConfig
from glintru_rec.scoring.job import score
from glintru_rec.scoring.report import ScoreReport
from glintru_rec.scoring.update import UpdateReport, update_states

__all__ = ["MODES", "ScoreConfig", "ScoreReport", "UpdateReport", "score", "update_states"]
