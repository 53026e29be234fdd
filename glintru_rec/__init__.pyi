from glintru_rec.data.dataset import SequenceDataset as SequenceDataset
from glintru_rec.encoders import Ensemble as Ensemble
from glintru_rec.encoders import GlintRU as GlintRU
from glintru_rec.encoders import LRURec as LRURec
from glintru_rec.encoders import RecGRELA as RecGRELA
from glintru_rec.encoders import SASRec as SASRec
from glintru_rec.errors import InputError as InputError
from glintru_rec.export import Artifact as Artifact
from glintru_rec.losses import full_softmax as full_softmax
from glintru_rec.losses import sampled_softmax as sampled_softmax
from glintru_rec.ranking import RankingModel as RankingModel
from glintru_rec.ranking import RankingModelConfig as RankingModelConfig
from glintru_rec.ranking import SequenceTower as SequenceTower
from glintru_rec.ranking import load_encoder as load_encoder

__version__: str
