"""Measure how long a checkpoint keeps training waiting: written in the background against written at once, in turns.

python tools/bench_checkpoint.py [--items 1000000] [--dim 64] [--saves 5] [--dir FOLDER]

One process, a made-up catalog, row-wise Adagrad. Between two saves training takes steps until the files of the first are
written. A plain copy of as many bytes in memory stands beside: training should wait no longer. FOLDER (default: the system's
temporary one) is where the files go, and decides what writing them costs.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.training.checkpoint import list_checkpoints
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer

NUM_USERS, LENGTH = 200, 50


def make_dataset(num_items: int) -> SequenceDataset:
    """Make histories of random items, in memory."""
    items = np.random.default_rng(0).integers(num_items, size=NUM_USERS * LENGTH)
    vocabulary = Vocabulary(pa.array(np.arange(num_items)), np.bincount(items, minlength=num_items))
    offsets = np.arange(NUM_USERS + 1) * LENGTH
    return SequenceDataset({"vocabulary_sha256": vocabulary.sha256}, vocabulary, pa.array(np.arange(NUM_USERS)), items, offsets)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--saves", type=int, default=5, help="of either kind")
    parser.add_argument("--dir", help="where the checkpoints go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder, process_group("cpu") as device:
        overrides = [f"model.embedding_dim={arguments.dim}", "data.path=none", f"output={folder}", "data.max_seq_len=50"]
        config = compose("train", TrainConfig, overrides)
        trainer = Trainer(config, make_dataset(arguments.items), device)
        trainer.begin_epoch()
        batches = list(trainer.batches.epoch(0))
        saves: dict[bool, list] = {True: [], False: []}
        copies = []
        for number in range(2 * arguments.saves):
            trainer.checkpoints.in_background = number % 2 == 0
            trainer.state = replace(trainer.state, step=number)
            trainer.checkpoints.save(trainer.state)
            while trainer.checkpoints.thread is not None and trainer.checkpoints.thread.is_alive():
                trainer.train_step(batches[number % len(batches)])
            trainer.checkpoints.wait()
            saves[trainer.checkpoints.in_background] += trainer.checkpoints.take_saves()
            size = sum(path.stat().st_size for path in list_checkpoints(Path(folder))[-1].rglob("*"))
            blank = torch.ones(size, dtype=torch.uint8)
            start = time.perf_counter()
            blank.clone()
            copies.append(time.perf_counter() - start)
    print(f"checkpoint of {size / 2**20:,.0f} MiB: {arguments.items:,} items x {arguments.dim}, row-wise Adagrad, one process")
    for in_background, kind in ((False, "at once"), (True, "in the background")):
        stalled, written = (
            [getattr(save, name) for save in saves[in_background]] for name in ("stalled_seconds", "write_seconds")
        )
        print(
            f"written {kind}: training waits {statistics.median(stalled):.3f} s, files take {statistics.median(written):.3f} s"
        )
    print(f"a plain copy of as many bytes takes {statistics.median(copies):.3f} s")
    ratio = statistics.median(a.stalled_seconds / b.stalled_seconds for a, b in zip(saves[False], saves[True]))
    print(f"waiting, at once / in the background: {ratio:.1f} (median of {arguments.saves})")


if __name__ == "__main__":
    main()
