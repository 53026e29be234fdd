"""The ranking model: a sequence tower beside dense and pooled sparse features, TorchRec's interaction, a head for each task.

::

    dense  ── MLP ──────────────────────────┐
    sparse ── EmbeddingBagCollection ───────┼─ interaction: DCN v2 or DLRM's dot products ─┬─ head: logit or value of task 1
    histories ── SequenceTower ── linear ───┘                                              └─ head … of task K

Shapes: B examples, F dense features, G pooled features, E their width, K tasks.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch, SparseArch
from torchrec.modules.crossnet import LowRankCrossNet

from glintru_rec.config import check, check_at_least, one_of
from glintru_rec.ranking.batches import RankingBatch
from glintru_rec.ranking.tower import SequenceTower


@dataclass
class RankingModelConfig:
    """What stands beside the tower, and what both go into.

    Attributes:
        embedding_dim: width E of pooled embeddings and of all that interacts, a multiple of 4.
        interaction: ``dcn`` (DCN v2 of low rank, arXiv 2008.13535) or ``dlrm`` (dot products of all pairs, arXiv 1906.00091).
        cross_layers: of ``dcn``.
        cross_rank: of ``dcn``.
        dense_layers: hidden sizes of the MLP on the dense features.
        head_layers: hidden sizes of each task's MLP.
        dropout: on the pooled embeddings, on what the tower gives, and on what the interaction gives.
    """

    embedding_dim: int = 16
    interaction: str = "dcn"
    cross_layers: int = 2
    cross_rank: int = 16
    dense_layers: list[int] = field(default_factory=lambda: [64])
    head_layers: list[int] = field(default_factory=lambda: [64])
    dropout: float = 0.0

    def __post_init__(self):
        check(
            "model.embedding_dim",
            self.embedding_dim,
            self.embedding_dim >= 4 and self.embedding_dim % 4 == 0,
            "a multiple of 4, at least 4",
        )
        one_of("model.interaction", self.interaction, ("dcn", "dlrm"))
        check_at_least(1, "model.", self, ("cross_layers", "cross_rank"))
        for key in ("dense_layers", "head_layers"):
            check(
                f"model.{key}", list(getattr(self, key)), all(size >= 1 for size in getattr(self, key)), "sizes of at least 1"
            )
        check("model.head_layers", list(self.head_layers), len(self.head_layers) >= 1, "one size or more")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and less than 1")


class RankingModel(nn.Module):
    """Predict every task of every example from its features and its user's history.

    Args:
        tasks: their names, in the order of the labels.
        sparse: pooled feature → rows of its table.
        num_dense: dense features F.
        tower: of the histories; None for a model without one.
        config: sizes.
        init_std: standard deviation of the embeddings' start.
        device: of the tables; ``meta`` where they will be sharded.
    """

    def __init__(
        self,
        tasks: list[str],
        sparse: dict[str, int],
        num_dense: int,
        tower: SequenceTower | None,
        config: RankingModelConfig,
        init_std: float = 0.02,
        device: torch.device | None = None,
    ):
        super().__init__()
        width = config.embedding_dim
        tables = [
            EmbeddingBagConfig(
                name=f"t_{name}",
                num_embeddings=rows,
                embedding_dim=width,
                feature_names=[name],
                init_fn=partial(nn.init.normal_, std=init_std),
            )
            for name, rows in sparse.items()
        ]
        self.sparse_arch = SparseArch(EmbeddingBagCollection(tables, device=device)) if tables else None
        self.dense_arch = DenseArch(max(num_dense, 1), [*config.dense_layers, width])
        self.tower = tower
        num_vectors = tower.num_outputs if tower is not None else 0
        self.tower_maps = nn.ModuleList(nn.Linear(tower.encoder.width, width) for _ in range(num_vectors) if tower is not None)
        num_interacting = len(tables) + num_vectors
        self.dropout = nn.Dropout(config.dropout)
        if config.interaction == "dcn":
            size = (num_interacting + 1) * width
            self.interaction: nn.Module = InteractionDCNArch(
                num_interacting, LowRankCrossNet(size, config.cross_layers, config.cross_rank)
            )
        else:
            size = width + math.comb(num_interacting + 1, 2)
            self.interaction = InteractionArch(num_interacting)
        self.heads = nn.ModuleDict({f"task_{name}": OverArch(size, [*config.head_layers, 1]) for name in tasks})

    def forward(self, batch: RankingBatch) -> Tensor:
        """Predict: ``[B, K]``; the logit of a binary task, the value of a number."""
        # Without dense features, a column of ones: the MLP is then one learnt vector.
        dense = self.dense_arch(batch.dense if batch.dense.size(1) else batch.dense.new_ones(batch.dense.size(0), 1))
        vectors = []
        if self.sparse_arch is not None:
            vectors.append(self.sparse_arch(batch.sparse))
        if self.tower is not None:
            outputs = self.tower(batch.histories, batch.seen)
            vectors.append(torch.stack([each(output) for each, output in zip(self.tower_maps, outputs)], dim=1))
        interacting = torch.cat(vectors, dim=1) if vectors else dense.new_zeros(dense.size(0), 0, dense.size(1))
        crossed = self.interaction(dense, self.dropout(interacting))
        crossed = self.dropout(crossed)
        return torch.cat([head(crossed) for head in self.heads.values()], dim=1)
