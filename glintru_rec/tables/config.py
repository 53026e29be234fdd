"""What decides how the item table is kept, spread and updated: the schema of ``configs/table/``."""

import math
from dataclasses import dataclass, field

from glintru_rec.config import check, one_of
from glintru_rec.errors import InputError

SHARDINGS = ("row_wise", "table_wise", "column_wise", "auto", "replicated")
# Optimizers that fbgemm fuses into the backward pass on CPU and CUDA alike; a replicated table takes AdamW.
FUSED_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
# Row-wise Adagrad keeps one step size for a row; of a row cut into columns it would keep one for each part.
COLUMN_WISE_OPTIMIZERS = ("adagrad", "sgd")
DTYPES = ("fp32", "fp16")
KERNELS = ("fused", "fused_uvm_caching")


@dataclass
class TopologyConfig:
    """What ``table.sharding=auto`` plans for, besides the run's own device and number of ranks.

    Attributes:
        memory_gib: that the table and its optimizer state may take on each rank: of the GPU's memory, or, without one, of
            the main memory.
        host_memory_gib: main memory that they may take for each rank with a GPU, where ``table.kernel`` uses it.
        ids_per_step: ids that a rank looks up in a step, history and negatives together.
    """

    memory_gib: float = 16.0
    host_memory_gib: float = 64.0
    ids_per_step: int = 2048

    def __post_init__(self):
        for key in ("memory_gib", "host_memory_gib"):
            value = getattr(self, key)
            check(f"table.topology.{key}", value, 0 < value < math.inf, "greater than 0 and finite")
        check("table.topology.ids_per_step", self.ids_per_step, self.ids_per_step >= 1, "at least 1")


@dataclass
class TableConfig:
    """The item table and its optimizer.

    Attributes:
        sharding: ``row_wise`` spreads the rows over the ranks; ``table_wise`` keeps the whole table on rank 0, which serves
            all; ``column_wise`` gives each rank some of the numbers of every row; ``auto`` lets TorchRec's planner choose
            among these for ``topology``; ``replicated`` keeps a copy on each rank (small catalogs).
        optimizer: ``rowwise_adagrad``, ``adagrad`` or ``sgd``, fused into the backward pass, for a sharded table;
            ``adamw`` for a replicated one. ``column_wise`` takes no ``rowwise_adagrad``.
        learning_rate: of the table.
        weight_decay: of the table; ``adamw`` only (fbgemm ignores it for the others on CPU, so it is refused there).
        eps: added to the root of the second moment.
        dtype: ``fp32``, or ``fp16`` rows (sharded only; on CPU without stochastic rounding: updates below a row's
            precision vanish).
        init_std: standard deviation of the normal distribution that embeddings start from (biases start at 0). A sharded
            item table's first values follow from ``trainer.seed`` alone, whatever the sharding and the number of ranks;
            those of a ranking run's sharded tables follow from the seed and the number of ranks.
        kernel: ``fused`` keeps a rank's share in its device's memory; ``fused_uvm_caching`` (CUDA only) in main memory,
            with the rows in use in a cache on the GPU.
        cache_load_factor: size of that cache, as a share of the table.
        topology: what ``auto`` plans for.
    """

    sharding: str = "row_wise"
    optimizer: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    eps: float = 1e-8
    dtype: str = "fp32"
    init_std: float = 0.02
    kernel: str = "fused"
    cache_load_factor: float = 0.2
    topology: TopologyConfig = field(default_factory=TopologyConfig)

    def __post_init__(self):
        one_of("table.sharding", self.sharding, SHARDINGS)
        one_of("table.optimizer", self.optimizer, (*FUSED_OPTIMIZERS, "adamw"))
        one_of("table.dtype", self.dtype, DTYPES)
        one_of("table.kernel", self.kernel, KERNELS)
        check("table.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "greater than 0 and finite")
        check("table.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        check("table.eps", self.eps, self.eps > 0, "greater than 0")
        check("table.init_std", self.init_std, self.init_std > 0, "greater than 0")
        share = "greater than 0 and at most 1"
        check("table.cache_load_factor", self.cache_load_factor, 0 < self.cache_load_factor <= 1, share)
        if self.sharded:
            self._check_sharded()
        else:
            self._check_replicated()

    @property
    def sharded(self) -> bool:
        """Whether ranks hold shares of one table, not copies."""
        return self.sharding != "replicated"

    def _check_sharded(self) -> None:
        if self.optimizer == "adamw":
            raise InputError(f"table.optimizer=adamw needs table.sharding=replicated; {self.sharding} takes {FUSED_OPTIMIZERS}")
        if self.weight_decay > 0:
            raise InputError(f"table.weight_decay={self.weight_decay}: fused {self.optimizer} ignores it; use 0, or adamw")
        if self.sharding == "column_wise" and self.optimizer not in COLUMN_WISE_OPTIMIZERS:
            raise InputError(
                "table.sharding=column_wise cannot take table.optimizer=rowwise_adagrad: its one step size per row would "
                "become one per column shard, so that training would depend on the number of ranks; use adagrad or sgd"
            )

    def _check_replicated(self) -> None:
        if self.optimizer != "adamw":
            raise InputError(f"table.optimizer={self.optimizer} is fused into a sharded table; a replicated one takes adamw")
        if self.dtype != "fp32":
            raise InputError(f"table.dtype={self.dtype} needs a sharded table; a replicated one is fp32")
        if self.kernel != "fused":
            raise InputError(f"table.kernel={self.kernel} needs a sharded table; a replicated one is a plain parameter")
