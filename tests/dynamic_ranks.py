"""Ranks that train on a vocabulary that changes under way; tests/test_dynamic_vocabulary.py judges what they did.

python -m tests.dynamic_ranks OUT   (OUT holds the datasets ``day 1`` and ``day 2``)

One process forks all ranks, group after group, so that torch and torchrec are imported once.
"""

import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.programs.train import train
from glintru_rec.tables.fresh_rows import make_fresh
from glintru_rec.tables.sharding import build_optimizer
from glintru_rec.training.build import build_distributed
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer
from tests.conftest import SMALL
from tests.table_ranks import NUM_ITEMS, SMALL_ENCODER, config_of, describe, make_dense, run_ranks, run_steps

CAPACITY, ADMIT_AFTER = 40, 4
STEPS, MIDDLE = 24, 10  # of day 1 on two ranks, somewhat more than an epoch; where its copies go on
VOCABULARY = [
    "data.vocabulary=dynamic",
    f"vocabulary.capacity={CAPACITY}",
    f"vocabulary.admit_after={ADMIT_AFTER}",
    "vocabulary.evict_ratio=1",
]
EVERY_STEP = ["trainer.log_every_steps=1", "trainer.checkpoint_every_steps=1", "trainer.keep_last=99"]

# Shardings whose rows are drawn anew, and which.
FRESH = ("row_wise", "table_wise", "column_wise adagrad", "row_wise fp16", "replicated")
FRESH_ROWS = [20, 3, 36, 19]
FRESH_SEED, FRESH_STEP = 5, 7
FRESH_WIDTH = 12  # and the columns of the bias: 16, which two ranks can share
WITH_BIASES = ("model.item_bias=true", f"model.embedding_dim={FRESH_WIDTH}")


def config(out: Path, day: int, run: str, *overrides: str) -> TrainConfig:
    fixed = [f"data.path={out / f'day {day}'}", f"output={out / run}", *SMALL, *SMALL_ENCODER, *VOCABULARY]
    return compose("train", TrainConfig, [*fixed, "trainer.patience=0", *overrides])


def draw_rows_anew(out: Path) -> None:
    results = {}
    with process_group("cpu") as device:
        for name in FRESH:
            chosen = config_of(name, *WITH_BIASES)
            model = build_distributed(chosen, NUM_ITEMS, device)
            optimizer = build_optimizer(model, chosen.table, make_dense)
            run_steps(model, optimizer, range(3))
            before = describe(model, optimizer)
            make_fresh(model, optimizer, torch.tensor(FRESH_ROWS), chosen.table.init_std, FRESH_SEED, FRESH_STEP)
            results[name] = {"before": before, "after": describe(model, optimizer)}
            run_steps(model, optimizer, range(3, 4))  # what was written is what the next step reads
            results[name]["next"] = describe(model, optimizer)
        torch.save(results, out / f"fresh {dist.get_rank()} of {dist.get_world_size()}.pt")


def train_program(*arguments) -> None:
    train(config(*arguments))


def begin(name: str, *arguments) -> None:
    """Write down what a trainer begins with: its map, and its parts of weights and optimizer state."""
    chosen = config(*arguments)
    with process_group("cpu") as device:
        trainer = Trainer(chosen, SequenceDataset.open(chosen.data.path), device)
        if chosen.trainer.resume:
            trainer.resume()
        found = describe(trainer.model, trainer.optimizer)
        torch.save(found, arguments[0] / f"{name} {dist.get_rank()}.pt")
        pq.write_table(trainer.items.id_map.to_table(), arguments[0] / f"{name} {dist.get_rank()}.parquet")


def copy_run(out: Path, run: str, copy: str, step: int) -> None:
    """Copy a run as it was after a step."""
    shutil.copytree(out / run, out / copy)
    for checkpoint in (out / copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    for name in FRESH:
        config_of(name, *WITH_BIASES)  # once, for all ranks that will be forked
    for world_size in (1, 2):
        run_ranks(draw_rows_anew, world_size, out)
    run_ranks(train_program, 2, out, 1, "two", *EVERY_STEP, f"trainer.max_steps={STEPS}")
    go_on = [*EVERY_STEP, f"trainer.max_steps={STEPS}", "trainer.resume=true"]
    copy_run(out, "two", "two again", MIDDLE)
    run_ranks(train_program, 2, out, 1, "two again", *go_on)
    copy_run(out, "two", "one", MIDDLE)
    run_ranks(begin, 1, "one begins", out, 1, "one", *go_on)
    run_ranks(train_program, 1, out, 1, "one", *go_on)
    run_ranks(begin, 2, "two begin", out, 1, "one", *go_on, "table=table_wise")
    warm = [f"trainer.init_from={out / 'two'}", "trainer.max_epochs=2"]
    run_ranks(begin, 2, "day 2 begins", out, 2, "later", *warm)
    run_ranks(train_program, 2, out, 2, "later", *warm)
    exact = ["loss=full_softmax", "table=replicated", "data.reader=row_groups", "trainer.max_epochs=1"]
    run_ranks(train_program, 1, out, 1, "exact", *exact)
    # A table of which the second rank's part is empty.
    roomy = ["vocabulary.capacity=1000", "vocabulary.admit_after=13", "loss=full_softmax", "trainer.max_steps=3"]
    run_ranks(train_program, 2, out, 1, "roomy", *roomy)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
