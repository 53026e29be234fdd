"""The item table: one TorchRec EmbeddingCollection that history and negatives are looked up in together."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from glintru_rec.errors import InputError
from glintru_rec.tables.config import TableConfig

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}

# An EmbeddingCollection keeps its tables in a ModuleDict, which refuses names such as "items".
TABLE_NAME = "t_item"
FEATURES = ("history", "more")

# Columns behind the embedding where items have a bias. The first is the bias; fbgemm wants widths that are multiples of 4,
# so there are three more, which nothing reads: no gradient reaches them, and they stay 0.
BIAS_COLUMNS = 4

# Rows that `fill_rows` draws at a time, each time from a seed of their own.
ROWS_PER_DRAW = 1 << 12
# Sets the seeds of rows apart from those of training steps, which use the seed and the step's number.
ROWS_STREAM = 2**40


class ItemTable(nn.Module):
    """One embedding per catalog item, and where asked for a bias: rows of R = D, or D + `BIAS_COLUMNS`, numbers.

    Args:
        num_items: catalog size; ids are ``0 .. num_items-1``. They are trusted here: fbgemm reads, and trains, row 0
            of a shard for an id out of range, so they are checked where they enter (`glintru_rec.data`).
        embedding_dim: width D; a multiple of 4, as fbgemm asks.
        config: dtype and initial scale.
        device: ``meta`` for a table that will be sharded: no rank ever holds the whole, and `fill_rows` draws the shards.
        item_bias: an item's row goes on with its bias, which starts at 0. It learns as the row does: row-wise Adagrad
            has one step size for the whole row, ``weight_decay`` is the table's.

    Attributes:
        row_width: numbers R of a row.
    """

    def __init__(self, num_items: int, embedding_dim: int, config: TableConfig, device: torch.device, item_bias: bool = False):
        super().__init__()
        if embedding_dim % 4:
            raise InputError(f"model.embedding_dim is {embedding_dim}; fbgemm tables need a multiple of 4")
        self.num_items = num_items
        self.embedding_dim = embedding_dim
        self.row_width = embedding_dim + BIAS_COLUMNS * item_bias
        init = partial(_init_rows, embedding_dim=embedding_dim, std=config.init_std)
        table = EmbeddingConfig(
            name=TABLE_NAME,
            num_embeddings=num_items,
            embedding_dim=self.row_width,
            feature_names=list(FEATURES),
            data_type=DTYPES[config.dtype],
            init_fn=_leave_rows if device.type == "meta" else init,
        )
        self.embeddings = EmbeddingCollection([table], device=device)

    def forward(self, item_ids: Tensor, more_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look up two lists of items in one exchange between ranks.

        Args:
            item_ids: int64 ``[T]``.
            more_ids: int64 ``[K]``.

        Returns:
            Rows ``[T, R]`` and ``[K, R]``, fp32.
        """
        # One bag per feature: the table returns a sequence, in order, so bags have no meaning here.
        features = KeyedJaggedTensor(
            keys=list(FEATURES),
            values=torch.cat([item_ids, more_ids]),
            lengths=torch.tensor([item_ids.numel(), more_ids.numel()], device=item_ids.device),
        )
        looked_up = self.embeddings(features)
        return looked_up["history"].values(), looked_up["more"].values()


@torch.no_grad()
def _init_rows(rows: Tensor, embedding_dim: int, std: float) -> None:
    """Draw embeddings; what follows them in a row starts at 0."""
    rows.normal_(std=std)
    rows[:, embedding_dim:].zero_()


def _leave_rows(rows: Tensor) -> None:
    """Draw nothing: TorchRec calls this for each shard, without saying which part of the table it is."""


@torch.no_grad()
def fill_rows(shard: Tensor, first_row: int, first_column: int, table: ItemTable, std: float, seed: int) -> None:
    """Draw the first values of a part of the table, in place.

    A value follows from the seed and its place in the table, not from how the table is cut. Memory: `ROWS_PER_DRAW` rows
    beside the shard.

    Args:
        shard: rows of it, ``[n, c]``, of any dtype, on any device.
        first_row: where the shard begins in the table.
        first_column: likewise.
        table: gives the sizes of the whole.
        std: standard deviation of the embeddings; what follows them in a row is 0.
        seed: at least 0.
    """
    last_row, last_column = first_row + shard.size(0), first_column + shard.size(1)
    for draw in range(first_row // ROWS_PER_DRAW, -(-last_row // ROWS_PER_DRAW)):
        start = draw * ROWS_PER_DRAW
        rows = torch.empty(min(ROWS_PER_DRAW, table.num_items - start), table.row_width)
        own_seed = np.random.SeedSequence([seed, ROWS_STREAM, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        rows.normal_(std=std, generator=torch.Generator().manual_seed(int(own_seed)))
        rows[:, table.embedding_dim :].zero_()
        begin, end = max(first_row, start), min(last_row, start + rows.size(0))
        shard[begin - first_row : end - first_row] = rows[begin - start : end - start, first_column:last_column]
