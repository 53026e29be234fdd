"""Training targets per second: every position of ragged batches, against the published formulation.

python tools/bench_train.py DATASET [--dim 128] [--batch-targets 512 16384] [--repeats 7]

The baseline (tools/published_formulation.py) is the published GLINT-RU: a padded batch of 128 prefixes of 200 items, one
target per prefix, softmax over the catalog, Adam. Ours is `Trainer.train_step` itself, with the default config but for
the width: lookup, encoder, sampled softmax, backward, optimizers. Both run in turn in one process; figures are medians.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from published_formulation import PublishedGlintRU, padded_prefix_batches

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer

MAX_SEQ_LEN, BATCH_SIZE = 200, 128


class PublishedBaseline:
    """Train the published formulation, one batch a call."""

    name = f"published formulation, {BATCH_SIZE} x {MAX_SEQ_LEN} padded, one target per prefix"

    def __init__(self, dataset: SequenceDataset, dim: int):
        items, offsets = map(torch.from_numpy, dataset.train_sequences())
        self.model = PublishedGlintRU(dataset.num_items, dim)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batches = padded_prefix_batches(items, offsets, MAX_SEQ_LEN, BATCH_SIZE, seed=0)

    def step(self) -> tuple[float, int]:
        """Take a step; give its seconds and its number of targets."""
        item_seq, lengths, targets = next(self.batches)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.loss(item_seq, lengths, targets).backward()
        self.optimizer.step()
        return time.perf_counter() - start, targets.numel()


class RaggedTraining:
    """Train as `Trainer` does, one batch a call."""

    def __init__(self, dataset: SequenceDataset, dim: int, batch_targets: int, overrides: list[str]):
        self.name = f"ours, ragged, every position, batches of {batch_targets} targets"
        fixed = ["data.path=.", "output=" + tempfile.mkdtemp(), f"model.embedding_dim={dim}"]
        fixed += [f"trainer.batch_targets={batch_targets}", f"data.max_seq_len={MAX_SEQ_LEN}"]
        self.trainer = Trainer(compose("train", TrainConfig, [*fixed, *overrides]), dataset, torch.device("cpu"))
        self.trainer.begin_epoch()
        self.batches = itertools.chain.from_iterable(self.trainer.batches.epoch(epoch) for epoch in itertools.count())

    def step(self) -> tuple[float, int]:
        """Take a step; give its seconds and its number of targets."""
        start = time.perf_counter()
        _, num_targets = self.trainer.train_step(next(self.batches)).tolist()
        self.trainer.state.step += 1
        return time.perf_counter() - start, int(num_targets)


def measure(contestants: list, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Let the contestants take turns of some seconds each; give each one's targets per second, turn by turn."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(repeats + 1):
        for contestant in contestants:
            spent, targets = 0.0, 0
            while spent < seconds:
                took, done = contestant.step()
                spent, targets = spent + took, targets + done
            if turn > 0:  # the first warms up
                rates[contestant.name].append(targets / spent)
    return rates


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-targets", type=int, nargs="+", default=[512, 16384])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn")
    parser.add_argument("overrides", nargs="*", help="of the training config, such as loss=full_softmax")
    arguments = parser.parse_args()
    dataset = SequenceDataset.open(arguments.dataset)
    with process_group("cpu"):
        baseline = PublishedBaseline(dataset, arguments.dim)
        ours = [RaggedTraining(dataset, arguments.dim, size, arguments.overrides) for size in arguments.batch_targets]
        rates = measure([baseline, *ours], arguments.repeats, arguments.seconds)
    print(f"{arguments.dataset}: D={arguments.dim}, {torch.get_num_threads()} threads, median of {arguments.repeats} turns")
    base = statistics.median(rates[baseline.name])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{rate:12,.0f} targets/s  {rate / base:7.1f}x  ({min(values):,.0f} .. {max(values):,.0f})  {name}")


if __name__ == "__main__":
    main()
