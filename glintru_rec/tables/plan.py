"""The sharding plan: which rank holds which part of the item table, and the bytes that takes."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, Topology, TopologyFactory, TrainerConfig
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding

from glintru_rec.errors import InputError
from glintru_rec.tables.config import COLUMN_WISE_OPTIMIZERS, TableConfig
from glintru_rec.tables.item_table import FEATURES, TABLE_NAME, ItemTable

TABLE_MODULE = "table.embeddings"
GIB = 2**30

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2}


def make_plan(table: ItemTable, config: TableConfig, device: torch.device) -> EmbeddingModuleShardingPlan:
    """Decide which rank holds which part of the table.

    Args:
        table: on ``meta``, with its fused optimizer attached.
        config: ``sharding`` is not ``replicated``.
        device: of this rank; the process group exists.

    Raises:
        InputError: the table cannot be spread so over these ranks, or has no room on them.
    """
    if config.kernel == "fused_uvm_caching" and device.type != "cuda":
        raise InputError(
            "table.kernel=fused_uvm_caching keeps rows in main memory and those in use on the GPU: it needs CUDA, and this "
            f"run computes on {device.type}; use table.kernel=fused"
        )
    if config.sharding == "auto":
        plan = _choose(table, config, device)
    else:
        world_size = dist.get_world_size()
        reason = _reason_against(config.sharding, table, world_size)
        if reason:
            raise InputError(reason)
        make = {
            "row_wise": lambda: row_wise(compute_kernel=config.kernel),
            "table_wise": lambda: table_wise(rank=0, compute_kernel=config.kernel),
            "column_wise": lambda: column_wise(ranks=list(range(world_size)), compute_kernel=config.kernel),
        }[config.sharding]
        plan = construct_module_sharding_plan(
            table.embeddings,
            {TABLE_NAME: make()},
            sharder=EmbeddingCollectionSharder(),
            world_size=world_size,
            device_type=device.type,
        )
    if config.kernel == "fused_uvm_caching":
        plan[TABLE_NAME].cache_params = CacheParams(load_factor=config.cache_load_factor)
    return plan


def _reason_against(sharding: str, table: ItemTable, world_size: int) -> str:
    """Say why the table cannot be sharded so; empty: it can."""
    if sharding == "row_wise" and -(-table.num_items // world_size) * (world_size - 1) >= table.num_items:
        return (
            f"{table.num_items} items spread by rows over {world_size} ranks leave a rank without any: "
            "use table=replicated or table=table_wise"
        )
    if sharding == "column_wise" and table.row_width % (4 * world_size):
        return (
            f"rows of {table.row_width} numbers (embedding and bias) cannot be spread by columns over {world_size} ranks: "
            f"fbgemm needs a multiple of 4 on each, so a multiple of {4 * world_size} in all"
        )
    return ""


def _choose(table: ItemTable, config: TableConfig, device: torch.device) -> EmbeddingModuleShardingPlan:
    """Let TorchRec's planner choose; all ranks plan for themselves, alike."""
    world_size = dist.get_world_size()
    kinds = ["row_wise", "table_wise"] + ["column_wise"] * (config.optimizer in COLUMN_WISE_OPTIMIZERS)
    topology = _topology(config, device, world_size)
    constraints = ParameterConstraints(
        sharding_types=[kind for kind in kinds if not _reason_against(kind, table, world_size)],
        compute_kernels=[config.kernel],
        min_partition=table.row_width // world_size,  # as many column shards as ranks
        pooling_factors=[config.topology.ids_per_step / len(FEATURES)] * len(FEATURES),
        cache_params=CacheParams(load_factor=config.cache_load_factor) if config.kernel == "fused_uvm_caching" else None,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,  # a step looks up one bag per feature
        storage_reservation=FixedPercentageStorageReservation(0.0),  # the memory stated is the table's alone
        constraints={TABLE_NAME: constraints},
        debug=False,
    )
    try:
        plan = planner.plan(table, [EmbeddingCollectionSharder()])
    except PlannerError as error:
        needed = table.num_items * _bytes_per_row(table, config) / GIB
        asked = config.topology
        raise InputError(
            f"table.sharding=auto found no room: the table and its optimizer state take {needed:.2f} GiB and what a step "
            f"looks up, for {world_size} ranks with table.topology.memory_gib={asked.memory_gib} each"
            + (f" and host_memory_gib={asked.host_memory_gib}" if device.type == "cuda" else "")
        ) from error
    return plan.plan["embeddings"]


def _topology(config: TableConfig, device: torch.device, world_size: int) -> Topology:
    """State the machines: bandwidths are TorchRec's defaults, memory is the config's."""
    memory, host_memory = config.topology.memory_gib, config.topology.host_memory_gib
    on_gpu = device.type == "cuda"
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            hbm_cap_bytes=int(memory * GIB) if on_gpu else None,
            ddr_cap_bytes=int((host_memory if on_gpu else memory) * GIB),
        ),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def _bytes_per_row(table: ItemTable, config: TableConfig) -> int:
    return table.row_width * BYTES_PER_VALUE[config.dtype] + state_bytes(config.optimizer, 1, table.row_width)


def state_bytes(optimizer: str, num_rows: int, num_columns: int) -> int:
    """Count the bytes of the optimizer's state for a part of the table; it is fp32 whatever the table is."""
    per_value = {"sgd": 0, "adagrad": 4, "adamw": 8}
    return 4 * num_rows if optimizer == "rowwise_adagrad" else per_value[optimizer] * num_rows * num_columns


@dataclass
class Shard:
    """A part of the table on a rank, and what it takes there."""

    rank: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    weight_bytes: int
    optimizer_bytes: int


def describe_plan(model: DistributedModelParallel, config: TableConfig) -> dict[str, Any]:
    """Say which rank holds which part of a model's table, and the bytes that takes, as JSON.

    Args:
        model: made by `glintru_rec.tables.sharding.distribute`.
        config: that it was made with.
    """
    table, world_size = model.module.table, dist.get_world_size()
    if config.sharded:
        placed: ParameterSharding = model.plan.plan[TABLE_MODULE][TABLE_NAME]
        sharding = placed.sharding_type
        parts = [(*part.shard_offsets, *part.shard_sizes) for part in placed.sharding_spec.shards]
        ranks = placed.ranks
    else:
        sharding = config.sharding
        parts = [(0, 0, table.num_items, table.row_width)] * world_size
        ranks = list(range(world_size))
    width = BYTES_PER_VALUE[config.dtype]
    shards = [
        Shard(rank, row, rows, column, columns, rows * columns * width, state_bytes(config.optimizer, rows, columns))
        for rank, (row, column, rows, columns) in zip(ranks, parts)
    ]
    held = [0] * world_size
    for shard in shards:
        held[shard.rank] += shard.weight_bytes + shard.optimizer_bytes
    return {
        "sharding": sharding,
        "chosen_for": {**asdict(config.topology), "device": model.device.type} if config.sharding == "auto" else None,
        "optimizer": config.optimizer,
        "dtype": config.dtype,
        "kernel": config.kernel if config.sharded else None,
        "num_ranks": world_size,
        "num_items": table.num_items,
        "row_width": table.row_width,
        "shards": [asdict(shard) for shard in shards],
        "bytes_per_rank": held,
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `describe_plan` says as a table, a rank a row."""
    title = f"item table: {plan['sharding']}, {plan['dtype']}, {plan['optimizer']}"
    if plan["chosen_for"]:
        title += f" (chosen for {plan['chosen_for']['memory_gib']} GiB a rank)"
    table = Table("rank", "rows", "columns", "weights", "optimizer state", "bytes")
    for rank, total in enumerate(plan["bytes_per_rank"]):
        for shard in [shard for shard in plan["shards"] if shard["rank"] == rank] or [None]:
            table.add_row(str(rank), *(_describe_shard(shard) if shard else ["none", "", "", ""]), f"{total:,}")
    print(title)
    Console(width=100).print(table, highlight=False)


def _describe_shard(shard: dict[str, int]) -> list[str]:
    last_row = shard["first_row"] + shard["num_rows"] - 1
    last_column = shard["first_column"] + shard["num_columns"] - 1
    spans = [f"{shard['first_row']:,} … {last_row:,}", f"{shard['first_column']} … {last_column}"]
    return [*spans, *(f"{shard[part] / 2**20:,.1f} MiB" for part in ("weight_bytes", "optimizer_bytes"))]
