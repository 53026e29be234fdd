"""Item table + encoder + similarity: the retrieval model. It knows no sharding and no loss.

Shapes: T items of a ragged batch, B sequences, D width, K further items.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.jagged import last_of_each, lengths_from_offsets, offsets_from_lengths
from glintru_rec.ops.rows import gather_rows

SIMILARITIES = ("dot", "cosine")


class TrainingOutput(NamedTuple):
    """What a loss needs of one batch."""

    query: Tensor
    """Hidden vector before each target, ``[T - B, D]``."""
    positive: Tensor
    """Item vector of each target, ``[T - B, D]``."""
    aim: Tensor
    """Mean item vector of the target and of what follows it within the horizon, ``[T - B, D]``."""
    target_ids: Tensor
    """int64 ``[T - B]``."""
    negatives: Tensor
    """Item vectors of the shared negatives, ``[K, D]``."""


class SequenceModel(nn.Module):
    """Score items by the similarity of their embedding to the encoded history.

    Args:
        table: maps ``(item_ids [T], more_ids [K])`` to their embeddings ``([T, D], [K, D])`` in one exchange.
        encoder: turns embeddings into hidden vectors.
        similarity: ``dot``, or ``cosine`` (both sides scaled to length 1).
    """

    def __init__(self, table: nn.Module, encoder: Encoder, similarity: str = "dot"):
        super().__init__()
        if similarity not in SIMILARITIES:
            raise InputError(f"model.similarity is {similarity!r}; choose one of {', '.join(SIMILARITIES)}")
        self.table = table
        self.encoder = encoder
        self.similarity = similarity

    def normalize(self, vectors: Tensor) -> Tensor:
        """Bring hidden or item vectors ``[*, D]`` to where their dot product is the score."""
        return functional.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def forward(
        self, item_ids: Tensor, offsets: Tensor, negative_ids: Tensor, horizon: int = 1, horizon_decay: float = 0.5
    ) -> TrainingOutput:
        """Encode sequences for training: every item but a sequence's first is the target of the item before it.

        A causal encoder trains on all of these pairs from one pass; the lookup of the history brings the targets'
        vectors along, and the negatives' in the same exchange. A bidirectional encoder sees the sequence without its
        last item and trains on that item alone.

        Args:
            item_ids: int64 ``[T]``, sequences of at least two items (or none).
            offsets: int64 ``[B + 1]``.
            negative_ids: int64 ``[K]``.
            horizon: how many of the following items a position aims at, where its sequence has them.
            horizon_decay: weight of each of them in proportion to the one before.
        """
        embedded, negatives = self.table(item_ids, negative_ids)
        is_last = torch.zeros(item_ids.size(0), dtype=torch.bool, device=item_ids.device)
        is_last[offsets[1:] - 1] = True
        is_first = torch.zeros_like(is_last)
        is_first[offsets[:-1]] = True
        inputs, targets = (~is_last).nonzero().squeeze(1), (~is_first).nonzero().squeeze(1)
        input_offsets = offsets_from_lengths(lengths_from_offsets(offsets) - 1)
        hidden = self.encoder(gather_rows(embedded, inputs), input_offsets)
        if not self.encoder.causal:
            targets = offsets[1:] - 1
            hidden = gather_rows(hidden, input_offsets[1:] - 1)
        embedded = self.normalize(embedded)
        positive = gather_rows(embedded, targets)
        aim = positive if horizon == 1 else _mean_ahead(embedded, targets, offsets, horizon, horizon_decay)
        return TrainingOutput(self.normalize(hidden), positive, aim, item_ids[targets], self.normalize(negatives))

    def encode(self, item_ids: Tensor, offsets: Tensor, more_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole histories.

        Args:
            item_ids: int64 ``[T]``.
            offsets: int64 ``[B + 1]``.
            more_ids: further items to look up in the same exchange, int64 ``[K]``.

        Returns:
            query ``[B, D]`` (an empty history gives zeros), and the vectors of ``more_ids``, ``[K, D]``.
        """
        embedded, more = self.table(item_ids, more_ids)
        query = last_of_each(self.encoder(embedded, offsets), offsets)
        return self.normalize(query), self.normalize(more)


def _mean_ahead(vectors: Tensor, rows: Tensor, offsets: Tensor, horizon: int, decay: float) -> Tensor:
    """Average the vectors of ``horizon`` items from each of ``rows`` on, within its sequence; the k-th weighs decay^k."""
    last = torch.repeat_interleave(offsets[1:] - 1, lengths_from_offsets(offsets))[rows]
    total, weight = vectors.index_select(0, rows), torch.ones_like(vectors[rows, :1])
    for k in range(1, horizon):
        here = (rows + k <= last).unsqueeze(1).to(vectors.dtype) * decay**k
        total = total + here * vectors.index_select(0, torch.minimum(rows + k, last))
        weight = weight + here
    return total / weight
