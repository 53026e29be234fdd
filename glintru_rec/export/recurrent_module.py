"""What an artifact of a recurrent encoder runs besides: a user's state, carried on event by event. It needs torch alone.

Shapes: T events of a ragged batch, B users, Q numbers of a query, S numbers of a packed state, F side features.
"""

import torch
from torch import Tensor

from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.export.scoring_module import MAX_BLOCK_CELLS, ScoringModule, checked_offsets
from glintru_rec.ops.time_major import time_major


class RecurrentScoringModule(ScoringModule):
    """A `ScoringModule` that also goes on from where a user was, at a cost that the history's length does not change.

    A state knows the whole history, while `encode` sees its last ``max_seq_len`` items: both give the same query as long
    as the history has no more than these.

    Args:
        encoder: has the recurrent form.
        item_vectors: see `ScoringModule`.
        similarity: see `ScoringModule`.
        max_seq_len: see `ScoringModule`.
        max_block_cells: see `ScoringModule`.
        precision: see `ScoringModule`.
        side: see `ScoringModule`.
    """

    first_state: Tensor

    def __init__(
        self,
        encoder: Encoder,
        item_vectors: Tensor,
        similarity: str,
        max_seq_len: int,
        max_block_cells: int = MAX_BLOCK_CELLS,
        precision: str = "fp32",
        side: SideEmbeddings | None = None,
    ):
        super().__init__(encoder, item_vectors, similarity, max_seq_len, max_block_cells, precision, side)
        self.register_buffer("first_state", encoder.pack_state(encoder.init_state(1)))

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        """Give the state of ``batch_size`` users before their first event, float32 ``[B, S]``."""
        return self.first_state.repeat(batch_size, 1)

    @torch.jit.export
    def step(self, item_ids: Tensor, state: Tensor, side_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take in one event of each user.

        Args:
            item_ids: int64 ``[B]``.
            state: float32 ``[B, S]``; left as it is.
            side_ids: of the events, int64 ``[B, F]``, where the model has side features.

        Returns:
            query, float32 ``[B, Q]``, as `encode` gives it, and the state after the event, float32 ``[B, S]``.
        """
        hidden, after = self.encoder.step(self._embeddings(item_ids, side_ids), self.encoder.unpack_state(state))
        return self._query(hidden), self.encoder.pack_state(after)

    @torch.jit.export
    def advance(
        self, item_ids: Tensor, lengths: Tensor, state: Tensor, side_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take in any number of events of each user, in their order.

        Args:
            item_ids: new events, oldest first, user after user, int64 ``[T]``.
            lengths: new events of each user, int64 ``[B]``, T in all.
            state: before them, float32 ``[B, S]``; left as it is.
            side_ids: of the events, int64 ``[T, F]``, where the model has side features.

        Returns:
            query after the last event, float32 ``[B, Q]``, and the state after it, float32 ``[B, S]``. A user without
            events keeps the state and has the query of an empty history.

        Raises:
            ValueError: ``lengths`` do not add up to T, there are not B of them, or ``side_ids`` have not T rows.
        """
        if lengths.numel() != state.size(0):
            raise ValueError(f"{lengths.numel()} lengths were given for {state.size(0)} states")
        if side_ids is not None and side_ids.size(0) != item_ids.size(0):
            raise ValueError(f"{side_ids.size(0)} rows of side_ids were given for {item_ids.size(0)} items")
        # Users with the most events first: those who have a t-th event are the first alive[t] of them.
        order = time_major(checked_offsets(lengths, item_ids), item_ids.size(0))
        events = item_ids.index_select(0, order.rows)
        event_side = side_ids.index_select(0, order.rows) if side_ids is not None else None
        ranked = state.index_select(0, order.ranking)
        ranked_query = self._query(state.new_zeros([lengths.numel(), self.encoder.width]))
        start = 0
        for alive in order.alive:
            side = event_side[start : start + alive] if event_side is not None else None
            query, after = self.step(events[start : start + alive], ranked[:alive], side)
            ranked_query[:alive] = query
            ranked[:alive] = after
            start += alive
        queries, states = torch.empty_like(ranked_query), torch.empty_like(ranked)
        queries[order.ranking] = ranked_query
        states[order.ranking] = ranked
        return queries, states
