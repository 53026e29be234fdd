"""Shard any module's embedding collections over the ranks; replicate the rest of it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from glintru_rec.tables.config import TableConfig
from glintru_rec.tables.sharding import FUSED

# A table of fewer rows for each rank is not worth spreading: it goes whole to one rank, in turn.
MIN_ROWS_PER_RANK = 256


def distribute_collections(
    model: nn.Module, config: TableConfig, device: torch.device, scales: dict[str, float] | None = None
) -> DistributedModelParallel:
    """Shard every EmbeddingCollection and EmbeddingBagCollection in a model, under one DistributedModelParallel.

    Large tables are spread by rows, small ones go whole to one rank each; ``config.sharding=replicated`` leaves all of them
    on every rank. A fused optimizer is attached to sharded tables: their rows change inside ``backward()``.

    Args:
        model: its collections on ``meta`` if they will be sharded; its other parameters equal on every rank.
        config: sharding and optimizer of the tables.
        device: of this rank.
        scales: table's parameter name → factor of its learning rate; others have 1.
    """
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    # Checkpoints of tables that live on one rank alone load as DTensor only.
    env.output_dtensor = True
    sharders: list[ModuleSharder[nn.Module]] = []
    plan = ShardingPlan({})
    if config.sharding != "replicated":
        for name, parameter in model.named_parameters():
            if _is_table(model, name):
                options: dict[str, float] = {"lr": config.learning_rate * (scales or {}).get(name, 1.0)}
                if config.optimizer != "sgd":
                    options["eps"] = config.eps
                apply_optimizer_in_backward(FUSED[config.optimizer], [parameter], options)
        bags, sequences = EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()
        sharders = [bags, sequences]
        world_size, num_small = dist.get_world_size(), 0
        for path, module in _collections(model):
            sharder: ModuleSharder
            tables: Sequence[BaseEmbeddingConfig]
            if isinstance(module, EmbeddingBagCollection):
                tables, sharder = module.embedding_bag_configs(), bags
            else:
                tables, sharder = module.embedding_configs(), sequences
            chosen = {}
            for table in tables:
                if table.num_embeddings >= MIN_ROWS_PER_RANK * world_size:
                    chosen[table.name] = row_wise()
                else:
                    chosen[table.name] = table_wise(rank=num_small % world_size)
                    num_small += 1
            plan.plan[path] = construct_module_sharding_plan(
                module,
                chosen,
                sharder=sharder,
                world_size=world_size,
                device_type=device.type,
            )
    return DistributedModelParallel(model, env=env, device=device, plan=plan, sharders=sharders)


def table_parameters(model: nn.Module) -> list[str]:
    """Name the tables' parameters of a model that is not yet sharded."""
    return [name for name, _ in model.named_parameters() if _is_table(model, name)]


@torch.no_grad()
def write_known_rows(model: DistributedModelParallel, name: str, rows: Tensor, known: Tensor) -> None:
    """Write rows of a table, each rank into what it holds of it.

    Args:
        model: made by `distribute_collections`.
        name: of the table's parameter.
        rows: the whole table, ``[V, D]``.
        known: which rows to write, bool ``[V]``.
    """
    weight = model.state_dict()[name]
    pieces = [(weight, (0, 0))]
    if hasattr(weight, "to_local"):
        local = weight.to_local()
        pieces = list(zip(local.local_shards(), local.local_offsets()))
    for piece, offsets in pieces:
        first, count = int(offsets[0]), piece.size(0)
        mine = known[first : first + count]
        piece[mine.to(piece.device)] = rows[first : first + count][mine].to(piece)


def _collections(model: nn.Module) -> list[tuple[str, EmbeddingBagCollection | EmbeddingCollection]]:
    kinds = (EmbeddingBagCollection, EmbeddingCollection)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def _is_table(model: nn.Module, name: str) -> bool:
    return any(name.startswith(f"{path}.") for path, _ in _collections(model))
