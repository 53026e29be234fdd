"""Ranks that train, save and load small item tables under every sharding; tests/test_tables.py judges what they did.

python -m tests.table_ranks OUT DATASET

One process forks all ranks, group after group, so that torch and torchrec are imported once.
"""

import multiprocessing
import os
import socket
import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.optim  # torchrec needs it, and it takes long: before the ranks fork
from torch import Tensor, nn

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import sampled_softmax
from glintru_rec.metrics import Protocol
from glintru_rec.model import SequenceModel
from glintru_rec.programs.evaluate import EvaluateConfig, evaluate_run
from glintru_rec.programs.train import train
from glintru_rec.scoring.evaluation import evaluate
from glintru_rec.tables.plan import describe_plan
from glintru_rec.tables.sharding import TABLE_KEY, build_optimizer
from glintru_rec.training.build import build_distributed
from glintru_rec.training.checkpoint import load_checkpoint
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group

WORLD_SIZES = (1, 2, 4)
STEPS, MORE_STEPS = 10, 2
NUM_ITEMS, WIDTH = 37, 16  # 4 ranks have 10, 10, 10 and 7 rows, or 4 columns each
RATE, EPS = 0.05, 1e-2  # an eps at the gradients' scale: rounding near 0 decides no update's sign

PROGRAM = [f"model.embedding_dim={WIDTH}", "model.options.num_heads=2", "data.max_seq_len=20", "trainer.batch_targets=128"]
# The table is the subject: an encoder of few tensors, which every checkpoint reads and writes.
SMALL_ENCODER = [f"++model.options.{part}=false" for part in ("gated_mlp", "gru_expert", "selective_gate")]
ADAGRAD = ("table.optimizer=adagrad",)
TABLES = {
    "row_wise": ("table=row_wise",),
    "table_wise": ("table=table_wise",),
    "auto": ("table=auto",),
    "row_wise adagrad": ("table=row_wise", *ADAGRAD),
    "table_wise adagrad": ("table=table_wise", *ADAGRAD),
    "column_wise adagrad": ("table=column_wise", *ADAGRAD),
    "row_wise sgd": ("table=row_wise", "table.optimizer=sgd"),
    "column_wise sgd": ("table=column_wise", "table.optimizer=sgd"),
    "row_wise fp16": ("table=row_wise", "table.dtype=fp16"),
    "row_wise fp16 adagrad": ("table=row_wise", "table.dtype=fp16", *ADAGRAD),
    "column_wise fp16": ("table=column_wise", "table.dtype=fp16", *ADAGRAD),
    "replicated": ("table=replicated",),
}
# Evaluated on a fresh table, which should not depend on the sharding.
RANKED = ("row_wise", "table_wise", "column_wise adagrad", "row_wise fp16", "column_wise fp16")
REFUSED = {
    "kernel": ("row_wise", NUM_ITEMS, "table.kernel=fused_uvm_caching"),
    "columns": ("column_wise adagrad", NUM_ITEMS, "model.embedding_dim=20"),
    "rows": ("row_wise", 2),
    "memory": ("auto", 10**8, "table.topology.memory_gib=1"),
    "half": ("auto", 10**5, "table.topology.memory_gib=0.005", "table.topology.ids_per_step=64"),
}
# Which checkpoints are loaded under which sharding, on each number of ranks.
ROWWISE = [f"{name} of {world_size}" for name in ("row_wise", "table_wise") for world_size in WORLD_SIZES]
COLUMNS = [f"column_wise adagrad of {world_size}" for world_size in WORLD_SIZES]
OTHERS = ["row_wise adagrad of 4", "table_wise adagrad of 2", "column_wise adagrad of 2"]
LOADS = [
    *((source, into) for source in ROWWISE for into in ("row_wise", "table_wise")),
    *((source, "row_wise adagrad") for source in COLUMNS),
    *((source, "column_wise adagrad") for source in OTHERS),
    ("row_wise fp16 adagrad of 4", "column_wise fp16"),
]
# Their optimizers differ: weights alone.
LOADS_OF_WEIGHTS = [("replicated of 2", "row_wise"), ("row_wise of 4", "replicated"), ("table_wise of 2", "replicated")]


@cache
def config_of(name: str, *overrides: str) -> TrainConfig:
    fixed = ["data.path=x", "output=y", f"model.embedding_dim={WIDTH}", "model.options.num_heads=2", "trainer.seed=5"]
    fixed += ["model.options.dropout=0", *SMALL_ENCODER]
    rates = [f"table.learning_rate={RATE}", f"table.eps={EPS}"]
    return compose("train", TrainConfig, [*fixed, *TABLES[name], *rates, *overrides])


def make_parts(step: int) -> list[tuple[Tensor, Tensor]]:
    """Four parts of a step's batch, ragged and of different sizes; item 3 is in all of them."""
    generator = torch.Generator().manual_seed(step)
    parts = []
    for lengths in ([2, 5], [3], [7, 2, 2], [4, 3]):
        item_ids = torch.randint(NUM_ITEMS, (sum(lengths),), generator=generator)
        item_ids[0] = 3
        parts.append((item_ids, offsets_from_lengths(torch.tensor(lengths))))
    return parts


def losses_of(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One loss per target of some parts together."""
    item_ids = torch.cat([ids for ids, _ in parts])
    offsets = offsets_from_lengths(torch.cat([offsets.diff() for _, offsets in parts]))
    negative_ids = torch.arange(0, NUM_ITEMS, 3)
    output = model(item_ids, offsets, negative_ids)
    return sampled_softmax(output.query, output.positive, output.negatives, output.target_ids, negative_ids, None)


def num_targets(step: int) -> int:
    return sum(ids.numel() - offsets.numel() + 1 for ids, offsets in make_parts(step))


def make_dense(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, eps=EPS)


def run_steps(model, optimizer, steps: range) -> list[Tensor]:
    """Train on this rank's share of each step's parts; give its losses, step by step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = 4 // world_size
    all_losses = []
    for step in steps:
        optimizer.zero_grad()
        losses = losses_of(model, make_parts(step)[rank * share : (rank + 1) * share])
        (losses.sum() * world_size / num_targets(step)).backward()  # gradients are means over ranks
        optimizer.step()
        all_losses.append(losses.detach())
    return all_losses


def parts_of(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """What this rank holds of a tensor of a state dict: where each part begins, and the part."""
    if not hasattr(tensor, "to_local"):
        return [((0,) * tensor.dim(), tensor.detach().clone())]
    local = tensor.to_local()
    return [(tuple(at)[: part.dim()], part.detach().clone()) for part, at in zip(local.local_shards(), local.local_offsets())]


def describe(model, optimizer) -> dict:
    """This rank's weights and optimizer state."""
    states = optimizer.state_dict()["state"]
    state = next((state for key, state in states.items() if key.endswith(TABLE_KEY)), {})
    weights = model.state_dict()
    return {
        "table": parts_of(weights[TABLE_KEY]),
        "state": {name: parts_of(value) for name, value in state.items() if value.dim()},
        "encoder": {name: value.clone() for name, value in weights.items() if name != TABLE_KEY},
    }


def train_and_save(out: Path, dataset_dir: Path) -> None:
    """Train under every sharding on this number of ranks; save checkpoints, and what each rank saw."""
    dataset, results = SequenceDataset.open(dataset_dir), {}
    with process_group("cpu") as device:
        for name in TABLES:
            config = config_of(name)
            model = build_distributed(config, NUM_ITEMS, device)
            optimizer = build_optimizer(model, config.table, make_dense)
            first = describe(model, optimizer)
            losses = run_steps(model, optimizer, range(STEPS))
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.save(tensors, checkpoint_id=out / f"{name} of {dist.get_world_size()}")
            results[name] = {"first": first, "losses": losses, "last": describe(model, optimizer)}
            results[name]["plan"] = describe_plan(model, config.table)
            if name in RANKED:
                fresh = build_distributed(config, dataset.num_items, device)
                results[name]["metrics"] = evaluate(fresh, dataset, Protocol(split="valid"), 20, 50)
        results["refused"] = {what: refusal(device, *asked) for what, asked in REFUSED.items()}
        torch.save(results, out / f"trained {dist.get_rank()} of {dist.get_world_size()}.pt")


def refusal(device: torch.device, name: str, num_items: int, *overrides: str) -> str:
    """The words that a table is refused with on these ranks; empty where it is not."""
    try:
        build_distributed(config_of(name, *overrides), num_items, device)
    except InputError as error:
        return str(error)
    return ""


def load_and_go_on(out: Path) -> None:
    """Load checkpoints of other shardings and numbers of ranks on this number of ranks, and train on."""
    results = {}
    with process_group("cpu") as device:
        for source, into in LOADS + LOADS_OF_WEIGHTS:
            config = config_of(into)
            model = build_distributed(config, NUM_ITEMS, device)
            optimizer = build_optimizer(model, config.table, make_dense)
            if (source, into) in LOADS_OF_WEIGHTS:
                load_checkpoint(out / source, model)
                results[source, into] = {"loaded": describe(model, optimizer)}
                continue
            load_checkpoint(out / source, model, optimizer)
            loaded = describe(model, optimizer)
            losses = run_steps(model, optimizer, range(STEPS, STEPS + MORE_STEPS))
            results[source, into] = {"loaded": loaded, "losses": losses}
        torch.save(results, out / f"loaded {dist.get_rank()} of {dist.get_world_size()}.pt")


def train_program(name: str, out: Path, dataset_dir: Path) -> None:
    fixed = [f"data.path={dataset_dir}", f"output={out / name} run", *PROGRAM]
    train(compose("train", TrainConfig, [*fixed, *TABLES[name], "trainer.max_steps=4"]))


def evaluate_program(name: str, out: Path, dataset_dir: Path) -> None:
    fixed = [f"data.path={dataset_dir}", f"checkpoint={out / name} run", f"output={out / name} run.json"]
    evaluate_run(compose("evaluate", EvaluateConfig, [*fixed, "split=valid"]))


def resume_program(out: Path, dataset_dir: Path) -> None:
    """Go on, by rows, with the run whose table one of two ranks had."""
    fixed = [f"data.path={dataset_dir}", f"output={out / 'table_wise run'}", *PROGRAM]
    train(compose("train", TrainConfig, [*fixed, *TABLES["row_wise"], "trainer.max_steps=6", "trainer.resume=true"]))


class PlainTable(nn.Module):
    """An unsharded table of the same rows."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.weight = nn.Parameter(rows.clone())

    def forward(self, item_ids: Tensor, more_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight[item_ids], self.weight[more_ids]


class RowwiseAdagrad(torch.optim.Optimizer):
    """s ← s + mean(g²) of each row;  w ← w - rate · g / (√s + eps)."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("s", parameter.new_zeros(len(parameter)))
                mean += parameter.grad.square().mean(1)
                parameter -= group["lr"] * parameter.grad / (mean.sqrt() + group["eps"]).unsqueeze(1)


def run_plain(model: SequenceModel, rows: Tensor, optimizer_name: str) -> tuple[list[Tensor], list[Tensor], list[dict]]:
    """Train an unsharded model in float64; give losses, tables and encoders after each step."""
    plain = SequenceModel(PlainTable(rows), model.encoder).double()
    table = [plain.table.weight]
    table_optimizer = {
        "rowwise_adagrad": lambda: RowwiseAdagrad(table, lr=RATE, eps=EPS),
        "adagrad": lambda: torch.optim.Adagrad(table, lr=RATE, eps=EPS),
        "sgd": lambda: torch.optim.SGD(table, lr=RATE),
        "adamw": lambda: torch.optim.AdamW(table, lr=RATE, eps=EPS, weight_decay=0.0),
    }[optimizer_name]()
    dense = make_dense([{"params": list(plain.encoder.parameters())}])
    losses, tables, encoders = [], [], []
    for step in range(STEPS + MORE_STEPS):
        plain.zero_grad()
        losses.append(losses_of(plain, make_parts(step)))
        (losses[-1].sum() / num_targets(step)).backward()
        table_optimizer.step()
        dense.step()
        tables.append(plain.table.weight.detach().clone())
        encoders.append({f"encoder.{name}": value.clone() for name, value in plain.encoder.state_dict().items()})
    return losses, tables, encoders


def run_ranks(work, world_size: int, *arguments) -> None:
    """Do ``work`` on forked ranks that share a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(work, rank, world_size, port, arguments)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"{work.__name__} on {world_size} ranks: exit codes {[rank.exitcode for rank in ranks]}")


def _rank(work, rank: int, world_size: int, port: int, arguments: tuple) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in {**address, "RANK": rank, "WORLD_SIZE": world_size}.items()})
    work(*arguments)


def main(out: Path, dataset_dir: Path) -> None:
    torch.set_num_threads(1)
    for name in TABLES:
        config_of(name)  # once, for all ranks that will be forked
    for name, _, *overrides in REFUSED.values():
        config_of(name, *overrides)
    for world_size in WORLD_SIZES:
        run_ranks(train_and_save, world_size, out, dataset_dir)
    for world_size in WORLD_SIZES:
        run_ranks(load_and_go_on, world_size, out)
    # Whole runs: a rank without rows, then ranks with columns.
    for name in ("table_wise", "column_wise adagrad"):
        run_ranks(train_program, 2, name, out, dataset_dir)
        described = out / f"{name} run" / "config.yaml"  # as if it had been trained on GPUs, with this kernel
        described.write_text(described.read_text().replace("kernel: fused\n", "kernel: fused_uvm_caching\n"))
        run_ranks(evaluate_program, 2, name, out, dataset_dir)
    run_ranks(resume_program, 1, out, dataset_dir)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
