"""Spread a model over the ranks: shard its item table with TorchRec, replicate the rest, build the optimizers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim import SGD, Adagrad, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from glintru_rec.model import SequenceModel
from glintru_rec.tables.config import TableConfig
from glintru_rec.tables.item_table import TABLE_NAME, ItemTable, fill_rows
from glintru_rec.tables.plan import TABLE_MODULE, make_plan

FUSED: dict[str, Any] = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD}
TABLE_KEY = f"{TABLE_MODULE}.embeddings.{TABLE_NAME}.weight"

# Rows that a look-up of the whole catalog exchanges at a time.
ROWS_PER_EXCHANGE = 1 << 16


def build_table(
    num_items: int, embedding_dim: int, config: TableConfig, device: torch.device, item_bias: bool = False
) -> ItemTable:
    """Make the item table: on ``meta`` when it will be sharded, so that no rank ever holds the whole of it."""
    return ItemTable(num_items, embedding_dim, config, torch.device("meta") if config.sharded else device, item_bias)


def distribute(model: SequenceModel, config: TableConfig, device: torch.device, seed: int) -> DistributedModelParallel:
    """Shard the table as ``config`` says and replicate everything else.

    A fused optimizer is attached to a sharded table: its rows change inside ``backward()``. Each rank draws the shards that
    it holds, of a table that depends on the seed alone.

    Args:
        model: its table made by `build_table`; its other parameters equal on every rank.
        config: sharding and optimizer of the table.
        device: of this rank.
        seed: of a sharded table's first values.

    Raises:
        InputError: the table cannot be sharded so on these ranks.
    """
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    env.output_dtensor = True  # in checkpoints: a ShardedTensor fails on a rank that holds no part of it
    if not config.sharded:
        return DistributedModelParallel(model, env=env, device=device, plan=ShardingPlan({}), sharders=[])
    table = model.table
    assert isinstance(table, ItemTable)
    fused_options: dict[str, float] = {"lr": config.learning_rate}
    if config.optimizer != "sgd":
        fused_options["eps"] = config.eps
    apply_optimizer_in_backward(FUSED[config.optimizer], table.parameters(), fused_options)
    sharder: Any = EmbeddingCollectionSharder()
    plan = ShardingPlan({TABLE_MODULE: make_plan(table, config, device)})
    distributed = DistributedModelParallel(model, env=env, device=device, plan=plan, sharders=[sharder])
    for shard, (row, column) in _local_shards(distributed.state_dict()[TABLE_KEY]):
        fill_rows(shard, row, column, table, config.init_std, seed)
    return distributed


def _local_shards(weight: DTensor) -> list[tuple[Tensor, tuple[int, int]]]:
    """List this rank's parts of the table, live, with the row and column where each begins."""
    local: Any = weight.to_local()
    return list(zip(local.local_shards(), local.local_offsets()))


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


@torch.no_grad()
def local_rows(model: DistributedModelParallel) -> tuple[Tensor, int]:
    """Give this rank's share of the item table, for scoring the whole catalog together; call it on all ranks at once.

    The ranks' shares cover the catalog, each item once; they follow one another in the order of ranks. Of a ``table_wise``
    table one rank has all rows, the others none. Rows that lie whole on a rank are the table's own memory, not a copy; a
    replicated table is divided evenly; of a ``column_wise`` table each rank gets an even share of whole rows.

    Returns:
        Rows ``[n, R]`` in the table's dtype without gradient (`SequenceModel.item_vectors` makes vectors of them), and the
        id of the first.
    """
    weight = model.state_dict()[TABLE_KEY]
    num_items, row_width = weight.shape
    own = answered_ids(num_items)
    if not isinstance(weight, DTensor):
        return weight.detach()[own.start : own.stop], own.start
    placed = model.plan.plan[TABLE_MODULE][TABLE_NAME]
    if placed.sharding_type != "column_wise":
        for shard, (row, _) in _local_shards(weight):
            return shard, row
        return torch.empty(0, row_width, dtype=weight.dtype, device=model.device), 0
    # Whole rows come by looking them up, which joins the columns. All ranks take the same number of turns.
    rows = torch.empty(len(own), row_width, dtype=weight.dtype, device=model.device)
    for start in range(0, -(-num_items // dist.get_world_size()), ROWS_PER_EXCHANGE):
        part = own[start : start + ROWS_PER_EXCHANGE]
        ids = torch.arange(part.start, part.stop, device=model.device)
        rows[start : start + len(part)] = model.module.table(ids, ids[:0])[0]
    return rows, own.start


def answered_ids(num_items: int) -> range:
    """Give the ids whose rows this rank looks up where all ranks go over the whole catalog together: an even part of them.

    Right for any sharding: the ranks' parts follow one another and cover the catalog (the last may be empty). A table that is
    sharded by rows is cut at the same places, so each rank finds its part at home; others divide the work all the same.
    """
    share = -(-num_items // dist.get_world_size())
    first = min(share * dist.get_rank(), num_items)
    return range(first, min(first + share, num_items))
