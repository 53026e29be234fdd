"""A trained model as a folder that any program with torch can score with."""

from glintru_rec.export.artifact import Artifact
from glintru_rec.export.exporting import Validation, export_artifact
from glintru_rec.export.recurrent_module import RecurrentScoringModule
from glintru_rec.export.replacing import replace_items
from glintru_rec.export.scoring_module import ScoringModule

__all__ = ["Artifact", "RecurrentScoringModule", "ScoringModule", "Validation", "export_artifact", "replace_items"]
