"""Bytes that training takes on each rank, before anything is bought or rented.

python tools/plan_memory.py num_items=100000000 dim=64 ranks=8 [dtype=fp16] [optimizer=rowwise_adagrad] [sharding=row_wise]
    [batch_targets=512] [history=50] [memory_gib=64] [OVERRIDES of launch/train.py]

Whatever grows with the catalog is computed: rows, optimizer state, gradients of a replicated table, averages, the copy that is
written to a checkpoint, scores of the validation. Whatever does not is measured here, on a catalog of 4,096 items: the process
with its libraries, a training step, a validation batch and the encoder's share of a checkpoint, of the very config.
``history`` is the mean length of the histories (``data.max_seq_len`` unless it is said). With ``memory_gib`` the exit status is
1 where the fullest rank has no room.

Main memory on a CPU machine, within 10 % of what a process was seen to take (tests/test_plan_memory.py). On GPUs table,
optimizer state and a step lie in the GPU's memory, the checkpoint's copy in the machine's: not run on one.
"""

import importlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glintru_rec.config import check, compose
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import NegativeSampler, Uniform, sampled_softmax
from glintru_rec.memory import give_back_freed
from glintru_rec.scoring.evaluation import BLOCK_SCORES, COMPARED_SCORES
from glintru_rec.tables.item_table import BIAS_COLUMNS
from glintru_rec.tables.plan import BYTES_PER_VALUE, state_bytes
from glintru_rec.tables.sharding import build_optimizer
from glintru_rec.training.averaging import WeightAverage
from glintru_rec.training.build import build_distributed
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.summary import peak_memory

MIB, GIB = 2**20, 2**30
SMALL_CATALOG = 4096
# Validation (`scoring/evaluation.py`) holds the scores of a block in fp32 while it makes the next; of those that it compares it
# has two truth values, and a copy in int64 of one.
BYTES_PER_SCORE = 2 * 4
BYTES_PER_COMPARED = 10
# Vectors and gradients of the exact softmax: looked up, gathered, and both once more on the way back.
CATALOG_COPIES = 4

# Weights and the two moments of AdamW.
ADAM_COPIES = 3

# What the program train has loaded besides when it trains.
LIBRARIES = ("glintru_rec.programs.train", "torch.utils.tensorboard")

# Short names of what is asked for most.
KEYS = {
    "dim": "model.embedding_dim",
    "dtype": "table.dtype",
    "optimizer": "table.optimizer",
    "sharding": "table",
    "batch_targets": "trainer.batch_targets",
}


@dataclass
class Held:
    """What grows with the catalog, on the fullest rank, in bytes.

    Attributes:
        table: rows of the item table.
        optimizer: its state for them.
        gradient: of a replicated table; a sharded one has none, its rows change inside ``backward``.
        average: of the weights (``optimizer.ema_decay``).
        step: that a training step takes for a moment.
        validation: that scores of the catalog take for a moment.
        checkpoint: the copy that is written while training goes on; resuming takes as much for a moment.
    """

    table: int
    optimizer: int
    gradient: int
    average: int
    step: int
    validation: int
    checkpoint: int

    @property
    def always(self) -> int:
        """Bytes held from the first step on."""
        return self.table + self.optimizer + self.gradient + self.average


@dataclass
class Process:
    """What does not grow with the catalog, in bytes.

    Attributes:
        libraries: of the process, with a model.
        step: that a training step adds at its peak.
        encoding: that steps and the encoding of validation histories add at their peak.
        dense: copy of the dense weights, their moments and average that is written to a checkpoint.
    """

    libraries: int
    step: int
    encoding: int
    dense: int


def peak(held: Held, process: Process) -> int:
    """Give the most bytes held at once.

    On a slow disk a checkpoint is still being written, from its copy, when training has gone on to validation, where the
    allocator may still have what encoding has freed when the catalog is scored.
    """
    moment = max(process.step + held.step, process.encoding + held.validation)
    return process.libraries + held.always + held.checkpoint + process.dense + moment


def held_by_table(config: TrainConfig, num_items: int, ranks: int) -> Held:
    """Compute what a catalog takes on the fullest rank."""
    table = config.table
    width = config.model.embedding_dim + BIAS_COLUMNS * config.model.item_bias
    share = -(-num_items // ranks)
    if table.sharding == "auto":
        raise InputError("sharding=auto is chosen by TorchRec's planner when a run starts: name the one that you expect")
    capacity = config.num_rows(num_items)
    if num_items != capacity:
        raise InputError(f"num_items is {num_items}; with a dynamic vocabulary, give the rows of the table: {capacity}")
    rows = share if table.sharding == "row_wise" else num_items
    columns = -(-width // ranks) if table.sharding == "column_wise" else width
    weights = rows * columns * BYTES_PER_VALUE[table.dtype]
    state = state_bytes(table.optimizer, rows, columns)
    copy = 0 if table.sharded else weights  # as large as the weights: a gradient, its average, …
    average = copy * (config.optimizer.ema_decay > 0)
    catalog = CATALOG_COPIES * share * width * 4 * config.loss.over_whole_catalog(num_items)
    users = config.trainer.eval_batch_users * ranks
    block = min(max(1, BLOCK_SCORES // max(users, width)), share)
    compared = min(max(COMPARED_SCORES, block), users * block)
    vectors = 4 * width * block * (table.dtype != "fp32")  # those of an fp32 table lie in it
    return Held(
        table=weights,
        optimizer=state,
        gradient=copy,
        average=average,
        step=2 * copy + catalog,  # summed over the batch, then over the ranks
        validation=BYTES_PER_SCORE * users * block + BYTES_PER_COMPARED * compared + vectors,
        checkpoint=(weights + state + average) * _copies_checkpoint(config),
    )


def _copies_checkpoint(config: TrainConfig) -> bool:
    return config.trainer.checkpoint_in_background or config.optimizer.ema_decay > 0


def measure_process(config: TrainConfig, history: int) -> Process:
    """Run training steps and encode a batch of validation histories of ``history`` items, on a small catalog."""
    for library in LIBRARIES:
        importlib.import_module(library)
    lengths = torch.full((max(1, config.trainer.batch_targets // history),), history + 1)
    item_ids, offsets = torch.randint(SMALL_CATALOG, (int(lengths.sum()),)), offsets_from_lengths(lengths)
    with process_group("cpu") as device:
        model = build_distributed(config, SMALL_CATALOG, device)
        decay = config.optimizer.ema_decay
        average = WeightAverage(model.module.parameters(), decay) if decay > 0 else None
        optimizer = build_optimizer(model, config.table, lambda groups: torch.optim.AdamW(groups, fused=True))
        sampler = NegativeSampler(Uniform(SMALL_CATALOG), min(config.loss.num_negatives, SMALL_CATALOG - 1))
        give_back_freed()
        libraries = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        dense = sum(parameter.nbytes for part in (model.module.encoder, model.module.side) for parameter in part.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            negative_ids, log_q, _ = sampler.draw(item_ids)
            output = model(item_ids, offsets, negative_ids)
            vectors = (output.query, output.positive, output.negatives)
            sampled_softmax(*vectors, output.target_ids, negative_ids, log_q).mean().backward()
            optimizer.step()
            if average is not None:
                average.update(0)
        step = peak_memory(device)["peak_memory_bytes"]
        users = config.trainer.eval_batch_users
        histories = torch.randint(SMALL_CATALOG, (users * history,))
        model.eval()
        with torch.no_grad():
            model.module.encode(histories, torch.arange(users + 1) * history, item_ids[:0])
        encoding = peak_memory(device)["peak_memory_bytes"]
        return Process(
            libraries,
            step=max(0, step - libraries),
            encoding=max(0, encoding - libraries),
            dense=(ADAM_COPIES + (average is not None)) * dense * _copies_checkpoint(config),
        )


def plan(arguments: list[str]) -> tuple[int, TrainConfig, int, int, float]:
    """Read the command line: items, config, ranks, mean length of a history, room in GiB (0: not said)."""
    own = {"num_items": "", "ranks": "1", "history": "", "memory_gib": "0"}
    overrides = ["data.path=.", "output=."]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(f"{KEYS.get(key, key)}={value}")
    if not own["num_items"]:
        raise InputError("missing value: give num_items=…")
    config = compose("train", TrainConfig, overrides)
    numbers: dict[str, float] = {}
    for key, text in {**own, "history": own["history"] or str(config.data.max_seq_len)}.items():
        try:
            numbers[key] = float(text)
        except ValueError as error:
            raise InputError(f"{key} is {text!r}; it must be a number") from error
        least, whole = (0, "") if key == "memory_gib" else (1, "whole ")
        holds = numbers[key] >= least and (not whole or numbers[key].is_integer())
        check(key, text, holds, f"a {whole}number from {least} on")
    items, ranks, history = (int(numbers[key]) for key in ("num_items", "ranks", "history"))
    return items, config, ranks, min(history, config.data.max_seq_len), numbers["memory_gib"]


def main() -> int:
    """Read the command line, compute, measure, print; give the exit status."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    try:
        num_items, config, ranks, history, memory_gib = plan(sys.argv[1:])
        held = held_by_table(config, num_items, ranks)
        process = measure_process(config, history)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = peak(held, process)
    width, targets, users = config.model.embedding_dim, config.trainer.batch_targets, config.trainer.eval_batch_users
    rows = [
        ("table", held.table, f"{num_items:,} items of {width} numbers, {config.table.dtype}, {config.table.sharding}"),
        ("optimizer", held.optimizer, config.table.optimizer),
        ("gradient", held.gradient, "of a replicated table"),
        ("average", held.average, "of the weights, optimizer.ema_decay"),
        ("libraries", process.libraries, "of the process, measured here"),
        ("a checkpoint while it is written", held.checkpoint + process.dense, "a copy of table, encoder, optimizers"),
        ("then, for a moment, the largest of", None, ""),
        ("  a training step", process.step + held.step, f"activations of {targets:,} targets; measured here"),
        (
            "  encoding and ranking in validation",
            process.encoding + held.validation,
            f"{users:,} histories of {history} items, measured here; {users * ranks:,} users at once",
        ),
        ("peak of each rank", total, f"{ranks} rank(s)"),
    ]
    table = Table("bytes of the fullest rank", "MiB", "what they are")
    for name, size, what in rows:
        table.add_row(name, "" if size is None else f"{size / MIB:,.0f}", what)
    Console(width=120).print(table, highlight=False)
    if memory_gib and total > memory_gib * GIB:
        print(f"no room: {total / GIB:.1f} GiB are needed, there are {memory_gib:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
