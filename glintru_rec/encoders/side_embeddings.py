"""What else is known of each event, added to its item's embedding before an encoder reads it.

Shapes: T events of a ragged batch, D width, F side features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SideEmbeddings(nn.Module):
    """Sum an item's embedding and those of its event's side features: ``x_n + E_1[s_n1] + … + E_F[s_nF]``.

    A sum, so that every encoder takes it, at every event by itself: forward and step agree as they do without. The tables are
    small and whole on every rank. Row 0 of each stands for an unknown value. It starts at 0, so what training never saw
    adds nothing; events without a value train it.

    Args:
        sizes: rows of each feature's table, the unknown one among them; empty: `forward` changes nothing.
        width: D.
        init_std: standard deviation of the other rows' start.

    Attributes:
        sizes: as given.
    """

    sizes: list[int]

    def __init__(self, sizes: Sequence[int], width: int, init_std: float = 0.02):
        super().__init__()
        self.sizes = list(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for weight in self.parameters():
            nn.init.normal_(weight, std=init_std)
            with torch.no_grad():
                weight[0].zero_()

    def forward(self, x: Tensor, side_ids: Tensor | None) -> Tensor:
        """Add the side features of events to their items.

        Args:
            x: embeddings of the items, ``[T, D]``.
            side_ids: a column for each feature, in the order of ``sizes``, int64 ``[T, F]``; may be None where F is 0.

        Returns:
            ``[T, D]``.

        Raises:
            ValueError: ``side_ids`` are not ``[T, F]``.
            IndexError: an id is not in its table.
        """
        if side_ids is None:
            if len(self.tables) > 0:
                raise ValueError(f"side_ids are missing: the model reads {len(self.tables)} side feature(s) of each event")
            return x
        if side_ids.dim() != 2 or side_ids.size(0) != x.size(0) or side_ids.size(1) != len(self.tables):
            raise ValueError(f"side_ids are {list(side_ids.size())}; they must be [{x.size(0)}, {len(self.tables)}]")
        for feature, table in enumerate(self.tables):
            x = x + table(side_ids[:, feature])
        return x
