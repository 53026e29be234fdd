"""The encoder inside a larger ranking model: `SequenceTower`, `RankingModel`, and what trains them."""

from glintru_rec.ranking.build import load_encoder
from glintru_rec.ranking.model import RankingModel, RankingModelConfig
from glintru_rec.ranking.tower import SequenceTower

__all__ = ["RankingModel", "RankingModelConfig", "SequenceTower", "load_encoder"]
