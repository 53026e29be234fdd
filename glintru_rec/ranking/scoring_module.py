"""What the artifact of a ranking model runs: the model on plain tensors. Compiled, it needs torch alone.

Shapes: B examples, T events of their histories, F dense features, G pooled features, S side features of an event, N pooled
ids, K tasks.
"""

import torch
import torch.fx
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionDCNArch

from glintru_rec.jagged import keep_last, last_of_each, lengths_from_offsets, offsets_from_lengths
from glintru_rec.ranking.model import RankingModel


class RankingModule(nn.Module):
    """A trained `RankingModel` behind one method that takes and gives tensors only.

    Every example has a history of its own. Batches and histories may have any length, 0 included, and no example's result
    depends on the others.

    Args:
        model: trained, on the CPU, its tables whole. Its weights are shared, not copied.
        is_binary: whether each task has a probability (otherwise a number), ``[K]``.
        means: of the dense features, as prepared, ``[F]``.
        deviations: likewise.
        max_seq_len: the encoder sees each history's last ``max_seq_len`` events.
    """

    is_binary: Tensor
    means: Tensor
    deviations: Tensor

    def __init__(
        self, model: RankingModel, is_binary: list[bool], means: list[float], deviations: list[float], max_seq_len: int
    ):
        super().__init__()
        tables = dict(model.sparse_arch.embedding_bag_collection.embedding_bags) if model.sparse_arch is not None else {}
        self.sparse_tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table.weight.detach(), mode="sum", include_last_offset=True)
            for table in tables.values()
        )
        tower = model.tower
        events = dict(tower.embeddings.embeddings) if tower is not None else {}
        self.event_tables = nn.ModuleList(nn.Embedding.from_pretrained(table.weight.detach()) for table in events.values())
        self.encoder = tower.encoder if tower is not None else None
        self.mix = tower.mix if tower is not None else None
        self.attention = tower.attention if tower is not None else None
        self.gives_query = tower is not None and tower.output != "attention"
        self.dense_arch, self.interaction, self.tower_maps = model.dense_arch, _unrolled(model.interaction), model.tower_maps
        self.heads = nn.ModuleList(model.heads.values())
        self.max_seq_len = max_seq_len
        self.register_buffer("is_binary", torch.tensor(is_binary))
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        # As preparing a dataset does: a feature that never changes is left at 0.
        self.register_buffer("deviations", torch.tensor([each or 1.0 for each in deviations], dtype=torch.float64))

    def forward(
        self, dense: Tensor, sparse_ids: Tensor, sparse_lengths: Tensor, events: Tensor, lengths: Tensor, candidates: Tensor
    ) -> Tensor:
        """Do what `predict` does."""
        return self.predict(dense, sparse_ids, sparse_lengths, events, lengths, candidates)

    @torch.jit.export
    def predict(
        self, dense: Tensor, sparse_ids: Tensor, sparse_lengths: Tensor, events: Tensor, lengths: Tensor, candidates: Tensor
    ) -> Tensor:
        """Predict every task of every example.

        Ids are rows of the tables, 0 for a value that training did not see.

        Args:
            dense: as the expressions give them, NaN where there is none, float64 ``[B, F]``.
            sparse_ids: of the pooled features, feature after feature, and in it example after example, int64 ``[N]``.
            sparse_lengths: ids of each feature and example, int64 ``[G, B]``, N in all.
            events: of the histories, oldest first: item and side features, int64 ``[T, 1 + S]``.
            lengths: events of each history, int64 ``[B]``, T in all.
            candidates: the item of each example, int64 ``[B]``.

        Returns:
            The probability of a binary task, the value of a number, float32 ``[B, K]``.
        """
        if dense.size(0) == 0:  # which the interaction cannot reshape
            return torch.zeros(0, self.is_binary.numel())
        scaled = ((dense - self.means) / self.deviations).to(torch.float32)
        scaled = torch.where(scaled.isfinite(), scaled, torch.zeros_like(scaled))
        if scaled.size(1) == 0:  # the model learnt a vector instead
            scaled = scaled.new_ones(scaled.size(0), 1)
        first = self.dense_arch(scaled)
        vectors: list[Tensor] = []
        start = 0
        for feature, table in enumerate(self.sparse_tables):
            stop = start + int(sparse_lengths[feature].sum())
            vectors.append(table(sparse_ids[start:stop], offsets_from_lengths(sparse_lengths[feature])))
            start = stop
        told = self._tower(events, lengths, candidates)
        for place, map_to_width in enumerate(self.tower_maps):
            vectors.append(map_to_width(told[place]))
        together = torch.stack(vectors, dim=1) if len(vectors) > 0 else first.new_zeros(first.size(0), 0, first.size(1))
        crossed = self.interaction(first, together)
        outputs: list[Tensor] = []
        for head in self.heads:
            outputs.append(head(crossed))
        predicted = torch.cat(outputs, dim=1)
        return torch.where(self.is_binary, predicted.sigmoid(), predicted)

    def _tower(self, events: Tensor, lengths: Tensor, candidates: Tensor) -> list[Tensor]:
        """Do what `SequenceTower` does where every example sees all of its own history: up to two ``[B, D]``."""
        told: list[Tensor] = []
        if self.encoder is not None:
            recent, offsets = keep_last(events, offsets_from_lengths(lengths), self.max_seq_len)
            rows: list[Tensor] = []
            candidate_vectors = torch.zeros(0)
            for feature, table in enumerate(self.event_tables):
                rows.append(table(recent[:, feature]))
                if feature == 0:
                    candidate_vectors = table(candidates)
            x = torch.stack(rows).sum(dim=0) if self.mix is None else self.mix(torch.cat(rows, dim=1))
            hidden = self.encoder(x, offsets)
            if self.gives_query:
                told.append(last_of_each(hidden, offsets))
            if self.attention is not None:
                padded = torch.cat([hidden, hidden.new_zeros(1, hidden.size(1))])
                one_each = torch.arange(lengths.numel() + 1, device=lengths.device)
                told.append(self.attention(candidate_vectors, one_each, padded, offsets, lengths_from_offsets(offsets)))
        return told


def _unrolled(interaction: nn.Module) -> nn.Module:
    """Write out the layers of a cross net, whose weights TorchScript cannot index in a loop; they stay shared."""
    if not isinstance(interaction, InteractionDCNArch):
        return interaction
    return InteractionDCNArch(interaction.F, torch.fx.symbolic_trace(interaction.crossnet))
