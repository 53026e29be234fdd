"""Spread a model over the ranks: shard its item table with TorchRec, replicate the rest, build the optimizers.

The only file that knows ``torchrec.distributed``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim import SGD, Adagrad, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from glintru_rec.errors import InputError
from glintru_rec.model import SequenceModel
from glintru_rec.tables.item_table import TABLE_NAME, ItemTable, TableConfig

FUSED: dict[str, Any] = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD}
TABLE_KEY = f"table.embeddings.embeddings.{TABLE_NAME}.weight"


def build_table(
    num_items: int, embedding_dim: int, config: TableConfig, device: torch.device, item_bias: bool = False
) -> ItemTable:
    """Make the item table: on ``meta`` when it will be sharded, so that no rank ever holds the whole of it."""
    sharded = config.sharding != "replicated"
    return ItemTable(num_items, embedding_dim, config, torch.device("meta") if sharded else device, item_bias)


def distribute(model: SequenceModel, config: TableConfig, device: torch.device) -> DistributedModelParallel:
    """Shard the table as ``config`` says and replicate everything else.

    A fused optimizer is attached to a sharded table: its rows change inside ``backward()``.

    Args:
        model: its table made by `build_table`; its other parameters equal on every rank.
        config: sharding and optimizer of the table.
        device: of this rank.
    """
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharders: list[ModuleSharder[nn.Module]] = []
    plan = ShardingPlan({})
    if config.sharding != "replicated":
        assert isinstance(model.table, ItemTable)
        num_items, world_size = model.table.num_items, dist.get_world_size()
        if -(-num_items // world_size) * (world_size - 1) >= num_items:
            raise InputError(
                f"{num_items} items spread by rows over {world_size} ranks leave a rank without any: use table=replicated"
            )
        fused_options: dict[str, float] = {"lr": config.learning_rate}
        if config.optimizer != "sgd":
            fused_options["eps"] = config.eps
        apply_optimizer_in_backward(FUSED[config.optimizer], model.table.parameters(), fused_options)
        sharder = EmbeddingCollectionSharder()
        sharders = [sharder]
        table_plan = construct_module_sharding_plan(
            model.table.embeddings,
            {TABLE_NAME: row_wise()},
            sharder=sharder,
            world_size=world_size,
            device_type=device.type,
        )
        plan = ShardingPlan({"table.embeddings": table_plan})
    return DistributedModelParallel(model, env=env, device=device, plan=plan, sharders=sharders)


def build_optimizer(
    model: DistributedModelParallel, config: TableConfig, dense: Callable[[list[dict]], torch.optim.Optimizer]
) -> CombinedOptimizer:
    """Join the table's optimizer and the dense parameters' into one.

    Args:
        model: made by `distribute`.
        config: of the table.
        dense: makes an optimizer from parameter groups (dicts with ``params``); a replicated table comes as a group
            with its own ``lr``, ``eps`` and ``weight_decay``.
    """
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))

    def factory(_: Any) -> torch.optim.Optimizer:
        groups: list[dict] = [{"params": [p for name, p in parameters.items() if name != TABLE_KEY]}]
        if TABLE_KEY in parameters:
            own = {"lr": config.learning_rate, "eps": config.eps, "weight_decay": config.weight_decay}
            groups.append({"params": [parameters[TABLE_KEY]], **own})
        return dense(groups)

    wrapped = KeyedOptimizerWrapper(parameters, factory)
    if config.sharding == "replicated":
        return CombinedOptimizer([("dense", wrapped)])
    return CombinedOptimizer([("table", model.fused_optimizer), ("dense", wrapped)])


def materialize_state(optimizer: CombinedOptimizer) -> None:
    """Make the dense optimizer's moments exist, so that loading a checkpoint fills them (it skips absent ones).

    Changes the parameters: load them afterwards.
    """
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state(None)


def local_rows(model: DistributedModelParallel) -> tuple[Tensor, int]:
    """Give this rank's share of the item table, for scoring the whole catalog together.

    Returns:
        Rows ``[n, R]`` in fp32 without gradient (`SequenceModel.item_vectors` makes vectors of them), and the id of the
        first. The ranks' shares follow one another and cover the catalog; a replicated table is divided evenly.
    """
    weight = model.state_dict()[TABLE_KEY]
    if isinstance(weight, Tensor) and not hasattr(weight, "local_shards"):
        share = -(-weight.size(0) // dist.get_world_size())
        first = min(share * dist.get_rank(), weight.size(0))
        return weight.detach()[first : first + share].float(), first
    shards = weight.local_shards()
    if not shards:
        return torch.empty(0, weight.size(1)), 0
    return shards[0].tensor.detach().float(), shards[0].metadata.shard_offsets[0]


def answered_ids(num_items: int) -> range:
    """Give the ids whose rows this rank looks up where all ranks go over the whole catalog together: an even part of them.

    Right for any sharding: the ranks' parts follow one another and cover the catalog (the last may be empty). A table that is
    sharded by rows is cut at the same places, so each rank finds its part at home; others divide the work all the same.
    """
    share = -(-num_items // dist.get_world_size())
    first = min(share * dist.get_rank(), num_items)
    return range(first, min(first + share, num_items))
