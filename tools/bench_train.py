"""Training targets per second: every position of ragged batches, against the published formulation.

python tools/bench_train.py DATASET [--dim 128] [--batch-targets 512 16384] [--models glint_ru …] [--compile] [--repeats 7]
                            [--figures benchmarks.csv] [key=value …]

The baseline (tools/published_formulation.py) is the published GLINT-RU: a padded batch of 128 prefixes of 200 items, one
target per prefix, softmax over the catalog, Adam. Ours is `Trainer.train_step` itself, with the default config but for
the width: lookup, encoder, sampled softmax, backward, optimizers. All run in turn in one process; rates are medians of the
turns, steps p20/p50/p80. ``data``: what making batches takes, as share of the step. ``of matmul``: operations of the encoder's
and the loss's products, as share of a large torch.mm's. First the operators and encoders are compared with their truth, as
tools/bench_ops.py does; where one is off nothing is measured (exit status 1).
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from bench_common import matmul_ceiling, note, percentiles, resident_bytes
from bench_ops import parity
from published_formulation import PublishedGlintRU, padded_prefix_batches

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer

MAX_SEQ_LEN, BATCH_SIZE = 200, 128


class Step(NamedTuple):
    """What a training step took."""

    seconds: float
    data_seconds: float
    """To make its batch, before."""
    targets: int


class PublishedBaseline:
    """Train the published formulation, one batch a call."""

    name = f"published formulation, {BATCH_SIZE} x {MAX_SEQ_LEN} padded, one target per prefix"

    def __init__(self, dataset: SequenceDataset, dim: int):
        items, offsets = map(torch.from_numpy, dataset.train_sequences())
        self.model = PublishedGlintRU(dataset.num_items, dim)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batches = padded_prefix_batches(items, offsets, MAX_SEQ_LEN, BATCH_SIZE, seed=0)
        catalog = self.model.item_embedding.weight.numel()
        per_item = sum(weight.numel() for weight in self.model.parameters() if weight.dim() > 1) - catalog
        self.operations = 6 * (MAX_SEQ_LEN * per_item + catalog)  # of one target

    def step(self) -> Step:
        """Take a step."""
        begin = time.perf_counter()
        item_seq, lengths, targets = next(self.batches)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.loss(item_seq, lengths, targets).backward()
        self.optimizer.step()
        return Step(time.perf_counter() - start, start - begin, targets.numel())


class RaggedTraining:
    """Train as `Trainer` does, one batch a call."""

    def __init__(self, dataset: SequenceDataset, dim: int, model: str, batch_targets: int, overrides: list[str]):
        self.name = f"{model}, ragged, every position, batches of {batch_targets} targets"
        fixed = ["data.path=.", "output=" + tempfile.mkdtemp(), f"model={model}", f"model.embedding_dim={dim}"]
        fixed += [f"trainer.batch_targets={batch_targets}", f"data.max_seq_len={MAX_SEQ_LEN}"]
        config = compose("train", TrainConfig, [*fixed, *overrides])
        self.trainer = Trainer(config, dataset, torch.device("cpu"))
        self.trainer.begin_epoch()
        self.batches = itertools.chain.from_iterable(self.trainer.batches.epoch(epoch) for epoch in itertools.count())
        encoder = self.trainer.model.module.encoder
        per_item = sum(weight.numel() for weight in encoder.parameters() if weight.dim() > 1)
        scored = dataset.num_items if config.loss.over_whole_catalog(dataset.num_items) else config.loss.num_negatives
        self.operations = 6 * (per_item + scored * dim)  # of one target: nearly one item each

    def step(self) -> Step:
        """Take a step."""
        begin = time.perf_counter()
        batch = next(self.batches)
        start = time.perf_counter()
        _, num_targets = self.trainer.train_step(batch).tolist()
        self.trainer.state.step += 1
        return Step(time.perf_counter() - start, start - begin, int(num_targets))


def measure(contestants: list, repeats: int, seconds: float) -> dict[str, list[list[Step]]]:
    """Let the contestants take turns of some seconds each; give each one's steps, turn by turn."""
    turns: dict[str, list[list[Step]]] = {contestant.name: [] for contestant in contestants}
    for turn in range(repeats + 1):
        for contestant in contestants:
            steps: list[Step] = []
            while sum(step.seconds for step in steps) < seconds:
                steps.append(contestant.step())
            if turn > 0:  # the first warms up
                turns[contestant.name].append(steps)
    return turns


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-targets", type=int, nargs="+", default=[512, 16384])
    parser.add_argument("--models", nargs="+", default=["glint_ru"], help="such as glint_ru rec_grela lru_rec sasrec")
    parser.add_argument("--compile", action="store_true", help="each model compiled besides")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn")
    parser.add_argument("--figures", type=Path, help="csv file to add the figures to")
    parser.add_argument("overrides", nargs="*", help="of the training config, such as loss=full_softmax")
    given = parser.parse_args()
    if wrong := parity(["gru", "attention", "scan", "conv", "softmax", "encoders"]):
        print("nothing was measured, for results are wrong:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    dataset, ceiling = SequenceDataset.open(given.dataset), matmul_ceiling()
    with process_group("cpu"):
        contestants: list = [PublishedBaseline(dataset, given.dim)]
        for model, size in itertools.product(given.models, given.batch_targets):
            contestants.append(RaggedTraining(dataset, given.dim, model, size, given.overrides))
            if given.compile:
                contestants.append(RaggedTraining(dataset, given.dim, model, size, [*given.overrides, "trainer.compile=true"]))
                contestants[-1].name += ", compiled"
        turns = measure(contestants, given.repeats, given.seconds)
    print(f"{given.dataset}: D={given.dim}, {torch.get_num_threads()} threads, median of {given.repeats} turns; ", end="")
    print(f"torch.mm {ceiling / 1e9:,.0f} GFLOP/s; memory at its peak {resident_bytes('VmHWM') / 2**30:.1f} GiB for all")
    rows: list[dict[str, object]] = []
    for contestant in contestants:
        rates = [sum(s.targets for s in steps) / sum(s.seconds for s in steps) for steps in turns[contestant.name]]
        steps = list(itertools.chain.from_iterable(turns[contestant.name]))
        rate, (p20, p50, p80) = statistics.median(rates), (1e3 * p for p in percentiles([step.seconds for step in steps]))
        data = sum(step.data_seconds for step in steps) / sum(step.seconds + step.data_seconds for step in steps)
        figures = {"targets_per_second": rate, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "data_share": data}
        rows.append({"name": contestant.name, **figures, "of_matmul": rate * contestant.operations / ceiling})
        ratio = rate / rows[0]["targets_per_second"]  # type: ignore[operator]
        print(f"{rate:12,.0f} targets/s  {ratio:7.1f}x  ({min(rates):,.0f} .. {max(rates):,.0f})  {contestant.name}")
        print(f"{'':14}step {p20:.1f} / {p50:.1f} / {p80:.1f} ms  data {data:.1%}  of matmul {rows[-1]['of_matmul']:.0%}")
    note("bench_train", rows, given.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
