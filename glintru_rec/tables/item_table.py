"""The item table: one TorchRec EmbeddingCollection that history and negatives are looked up in together."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from glintru_rec.config import check, one_of
from glintru_rec.errors import InputError

SHARDINGS = ("row_wise", "replicated")
# Optimizers that fbgemm fuses into the backward pass on CPU and CUDA alike; a replicated table takes AdamW.
FUSED_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}

# An EmbeddingCollection keeps its tables in a ModuleDict, which refuses names such as "items".
TABLE_NAME = "t_item"

# Columns behind the embedding where items have a bias. The first is the bias; fbgemm wants widths that are multiples of 4,
# so there are three more, which nothing reads: no gradient reaches them, and they stay 0.
BIAS_COLUMNS = 4


@dataclass
class TableConfig:
    """The item table and its optimizer.

    Attributes:
        sharding: ``row_wise`` spreads the rows over the ranks; ``replicated`` keeps a copy on each (small catalogs).
        optimizer: ``rowwise_adagrad``, ``adagrad`` or ``sgd``, fused into the backward pass, for a sharded table;
            ``adamw`` for a replicated one.
        learning_rate: of the table.
        weight_decay: of the table; ``adamw`` only (fbgemm ignores it for the others on CPU, so it is refused there).
        eps: added to the root of the second moment.
        dtype: ``fp32``, or ``fp16`` rows (sharded only; on CPU without stochastic rounding: updates below a row's
            precision vanish).
        init_std: standard deviation of the normal distribution that embeddings start from (biases start at 0).
    """

    sharding: str = "row_wise"
    optimizer: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    eps: float = 1e-8
    dtype: str = "fp32"
    init_std: float = 0.02

    def __post_init__(self):
        one_of("table.sharding", self.sharding, SHARDINGS)
        one_of("table.optimizer", self.optimizer, (*FUSED_OPTIMIZERS, "adamw"))
        one_of("table.dtype", self.dtype, tuple(DTYPES))
        check("table.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "greater than 0 and finite")
        check("table.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        check("table.eps", self.eps, self.eps > 0, "greater than 0")
        check("table.init_std", self.init_std, self.init_std > 0, "greater than 0")
        sharded = self.sharding != "replicated"
        if sharded and self.optimizer == "adamw":
            raise InputError(f"table.optimizer=adamw needs table.sharding=replicated; {self.sharding} takes {FUSED_OPTIMIZERS}")
        if not sharded and self.optimizer != "adamw":
            raise InputError(f"table.optimizer={self.optimizer} is fused into a sharded table; a replicated one takes adamw")
        if sharded and self.weight_decay > 0:
            raise InputError(f"table.weight_decay={self.weight_decay}: fused {self.optimizer} ignores it; use 0, or adamw")
        if not sharded and self.dtype != "fp32":
            raise InputError(f"table.dtype={self.dtype} needs a sharded table; a replicated one is fp32")


class ItemTable(nn.Module):
    """One embedding per catalog item, and where asked for a bias: rows of R = D, or D + `BIAS_COLUMNS`, numbers.

    Args:
        num_items: catalog size; ids are ``0 .. num_items-1``. They are trusted here: fbgemm reads, and trains, row 0
            of a shard for an id out of range, so they are checked where they enter (`glintru_rec.data`).
        embedding_dim: width D; a multiple of 4, as fbgemm asks.
        config: dtype and initial scale.
        device: ``meta`` for a table that will be sharded: no rank ever holds the whole.
        item_bias: an item's row goes on with its bias, which starts at 0. It learns as the row does: row-wise Adagrad
            has one step size for the whole row, ``weight_decay`` is the table's.
    """

    def __init__(self, num_items: int, embedding_dim: int, config: TableConfig, device: torch.device, item_bias: bool = False):
        super().__init__()
        if embedding_dim % 4:
            raise InputError(f"model.embedding_dim is {embedding_dim}; fbgemm tables need a multiple of 4")
        self.num_items = num_items
        table = EmbeddingConfig(
            name=TABLE_NAME,
            num_embeddings=num_items,
            embedding_dim=embedding_dim + BIAS_COLUMNS * item_bias,
            feature_names=["history", "more"],
            data_type=DTYPES[config.dtype],
            init_fn=partial(_init_rows, embedding_dim=embedding_dim, std=config.init_std),
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
            keys=["history", "more"],
            values=torch.cat([item_ids, more_ids]),
            lengths=torch.tensor([item_ids.numel(), more_ids.numel()], device=item_ids.device),
        )
        looked_up = self.embeddings(features)
        return looked_up["history"].values(), looked_up["more"].values()


@torch.no_grad()
def _init_rows(rows: Tensor, embedding_dim: int, std: float) -> None:
    """Draw embeddings; what follows them in a row starts at 0. A sharded table calls this with each rank's own rows."""
    rows.normal_(std=std)
    rows[:, embedding_dim:].zero_()
