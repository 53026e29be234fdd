"""Rows of the item table that go to other items: as if they had never been trained."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from glintru_rec.tables.sharding import TABLE_KEY

# Sets these seeds apart from those of training steps and of the table's first values.
_STREAM = 2**41


@torch.no_grad()
def make_fresh(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, rows: Tensor, init_std: float, seed: int, step: int
) -> None:
    """Draw rows anew, as the table's first values are drawn, and set their optimizer state to 0.

    Call it on all ranks with equal arguments, between two steps: each changes what it holds. The values follow from seed,
    step and place in ``rows``, whatever the sharding.

    Args:
        model: made by `glintru_rec.tables.sharding.distribute`.
        optimizer: made by `glintru_rec.tables.sharding.build_optimizer`.
        rows: each once, int64 ``[N]``.
        init_std: standard deviation of the embeddings; biases become 0.
        seed: at least 0.
        step: at least 0; a row drawn in two steps gets other values.
    """
    table = model.module.table
    own_seed = np.random.SeedSequence([seed, _STREAM, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    values = torch.empty(rows.numel(), table.row_width)
    values.normal_(std=init_std, generator=torch.Generator().manual_seed(int(own_seed)))
    values[:, table.embedding_dim :].zero_()
    _write(model.state_dict()[TABLE_KEY], rows, values)
    for name, state in optimizer.state_dict()["state"].items():
        if name.endswith(TABLE_KEY):
            for moments in state.values():
                if moments.dim():  # not the count of steps, which is the whole table's
                    _write(moments, rows, torch.zeros(rows.numel(), *moments.shape[1:]))


def _write(whole: Any, rows: Tensor, values: Tensor) -> None:
    """Write rows of a tensor into what this rank holds of it."""
    pieces = [(whole, (0, 0))]
    if isinstance(whole, DTensor):
        local: Any = whole.to_local()
        pieces = list(zip(local.local_shards(), local.local_offsets()))
    for piece, at in pieces:
        is_here = (rows >= at[0]) & (rows < at[0] + piece.size(0))
        part = values[is_here]
        if piece.dim() > 1:
            part = part[:, at[1] : at[1] + piece.size(1)]
        piece[(rows[is_here] - at[0]).to(piece.device)] = part.to(piece)
