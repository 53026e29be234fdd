"""Item table + encoder + similarity: the retrieval model. It knows no sharding and no loss.

A score is one dot product, ``query · item vector``, whatever it is made of::

                      query               item vector           score
    dot               hidden              e                     hidden · e
    cosine            hidden / |hidden|   e / |e|               cosine of hidden and e
    cosine, members   [h_1/|h_1|, ...]    [e_1/|e_1|, ...]      sum of the cosines of h_m and e_m, an `Ensemble`'s parts
    dot, item_bias    [hidden, 1]         [e, b]                hidden · e + b

Shapes: T items of a ragged batch, B sequences, D width, Q numbers of a query or item vector (D, or D + 1 with a bias), K
further items, R numbers of a table's row (Q or more), F side features of an event.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.config import check, one_of
from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.jagged import last_of_each, lengths_from_offsets, offsets_from_lengths
from glintru_rec.ops.rows import gather_rows

SIMILARITIES = ("dot", "cosine")


class TrainingOutput(NamedTuple):
    """What a loss needs of one batch."""

    query: Tensor
    """Query before each target, ``[T - B, Q]``."""
    positive: Tensor
    """Item vector of each target, ``[T - B, Q]``."""
    aim: Tensor
    """Mean item vector of the target and of what follows it within the horizon, ``[T - B, Q]``."""
    target_ids: Tensor
    """int64 ``[T - B]``."""
    negatives: Tensor
    """Item vectors of the shared negatives, ``[K, Q]``."""


def check_similarity(similarity: str, item_bias: bool) -> None:
    """Raise an `InputError` for a similarity there is not, or one that has no room for a bias."""
    one_of("model.similarity", similarity, SIMILARITIES)
    allowed = "false with model.similarity=cosine: a cosine has no room for a bias"
    check("model.item_bias", item_bias, not (item_bias and similarity == "cosine"), allowed)


def unit_parts(vectors: Tensor, members: int) -> Tensor:
    """Scale each member's part of vectors ``[*, D]`` to length 1."""
    return functional.normalize(vectors.unflatten(-1, (members, -1)), dim=-1).flatten(-2)


class SequenceModel(nn.Module):
    """Score items by the similarity of their embedding to the encoded history.

    Args:
        table: maps ``(item_ids [T], more_ids [K])`` to their rows ``([T, R], [K, R])`` in one exchange. A row is the item's
            embedding, D numbers, then its bias where items have one; what follows is not looked at.
        encoder: turns embeddings into hidden vectors.
        similarity: ``dot``, or ``cosine`` (both sides scaled to length 1, member by member).
        item_bias: add each item's bias to its scores; ``dot`` only.
        side: adds what is known of each event of a history, besides its item; None for nothing. Items to score have no side
            features: what an event was like is not known before it happens.

    Attributes:
        vector_dim: numbers Q of a query or item vector.

    Raises:
        InputError: no such similarity, or a bias with ``cosine``.
    """

    def __init__(
        self,
        table: nn.Module,
        encoder: Encoder,
        similarity: str = "dot",
        item_bias: bool = False,
        side: SideEmbeddings | None = None,
    ):
        super().__init__()
        check_similarity(similarity, item_bias)
        self.table = table
        self.encoder = encoder
        self.side = side if side is not None else SideEmbeddings([], encoder.width)
        self.similarity = similarity
        self.item_bias = item_bias
        self.vector_dim = encoder.width + item_bias

    def query_vectors(self, hidden: Tensor) -> Tensor:
        """Make queries ``[*, Q]`` of hidden vectors ``[*, D]``."""
        if self.similarity == "cosine":
            return unit_parts(hidden, self.encoder.members)
        return functional.pad(hidden, (0, 1), value=1.0) if self.item_bias else hidden

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Make item vectors ``[*, Q]`` of table rows ``[*, R]``: their dot product with a query is the score."""
        vectors = rows[..., : self.vector_dim]
        return unit_parts(vectors, self.encoder.members) if self.similarity == "cosine" else vectors

    def embeddings(self, rows: Tensor) -> Tensor:
        """Give what the encoder reads of table rows ``[*, R]``: ``[*, D]``."""
        # With cosines of several members it reads what is scored, so that an artifact needs no other table.
        if self.similarity == "cosine" and self.encoder.members > 1:
            return self.item_vectors(rows)
        return rows[..., : self.encoder.width]

    def target_places(self, offsets: Tensor) -> Tensor:
        """Say which items of a ragged batch are targets: all but each sequence's first, or the last if not causal."""
        if not self.encoder.causal:
            return offsets[1:] - 1
        is_first = torch.zeros(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
        is_first[offsets[:-1]] = True
        return (~is_first).nonzero().squeeze(1)

    def forward(
        self,
        item_ids: Tensor,
        offsets: Tensor,
        negative_ids: Tensor,
        horizon: int = 1,
        horizon_decay: float = 0.5,
        side_ids: Tensor | None = None,
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
            side_ids: of the items' events, int64 ``[T, F]``; None where the model reads none. A target's own are not read
                before the position that follows it.
        """
        rows, negatives = self.table(item_ids, negative_ids)
        is_last = torch.zeros(item_ids.size(0), dtype=torch.bool, device=item_ids.device)
        is_last[offsets[1:] - 1] = True
        inputs, targets = (~is_last).nonzero().squeeze(1), self.target_places(offsets)
        input_offsets = offsets_from_lengths(lengths_from_offsets(offsets) - 1)
        x = self.side(gather_rows(self.embeddings(rows), inputs), None if side_ids is None else side_ids[inputs])
        hidden = self.encoder(x, input_offsets).to(x.dtype)  # under torch.autocast an encoder may end in bf16
        if not self.encoder.causal:
            hidden = gather_rows(hidden, input_offsets[1:] - 1)
        vectors, negatives = self.item_vectors(rows), self.item_vectors(negatives)
        positive = gather_rows(vectors, targets)
        aim = positive if horizon == 1 else _mean_ahead(vectors, targets, offsets, horizon, horizon_decay)
        return TrainingOutput(self.query_vectors(hidden), positive, aim, item_ids[targets], negatives)

    def encode(
        self, item_ids: Tensor, offsets: Tensor, more_ids: Tensor, side_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode whole histories.

        Args:
            item_ids: int64 ``[T]``.
            offsets: int64 ``[B + 1]``.
            more_ids: further items to look up in the same exchange, int64 ``[K]``.
            side_ids: of the items' events, int64 ``[T, F]``; None where the model reads none.

        Returns:
            query ``[B, Q]``, and the vectors of ``more_ids``, ``[K, Q]``. An empty history has the hidden vector 0: every
            item scores 0, or its bias, which is a ranking by learnt popularity.
        """
        rows, more = self.table(item_ids, more_ids)
        hidden = last_of_each(self.encoder(self.side(self.embeddings(rows), side_ids), offsets), offsets)
        return self.query_vectors(hidden), self.item_vectors(more)


def _mean_ahead(vectors: Tensor, rows: Tensor, offsets: Tensor, horizon: int, decay: float) -> Tensor:
    """Average the vectors of ``horizon`` items from each of ``rows`` on, within its sequence; the k-th weighs decay^k."""
    last = torch.repeat_interleave(offsets[1:] - 1, lengths_from_offsets(offsets))[rows]
    total, weight = vectors.index_select(0, rows), torch.ones_like(vectors[rows, :1])
    for k in range(1, horizon):
        here = (rows + k <= last).unsqueeze(1).to(vectors.dtype) * decay**k
        total = total + here * vectors.index_select(0, torch.minimum(rows + k, last))
        weight = weight + here
    return total / weight
