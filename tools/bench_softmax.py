"""The exact softmax, forward and backward: memory as the catalog grows, and time against cross_entropy on full logits.

python tools/bench_softmax.py [--items 100000] [--targets 512] [--width 64] [--precision fp32] [--repeats 5]
                              [--growing 10000 100000 1000000 10000000] [--growing-width 8]

Memory (Linux, CPU) is by how much a pass raises a fresh process's peak above what it held with the inputs in place, less the
gradients of the inputs. Times are medians of turns in one process. The aim is an input of its own, as in training, where it
comes from the look-up of the histories.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_common import highest_during
from torch import Tensor
from torch.nn import functional

from glintru_rec.losses import full_softmax
from glintru_rec.losses.softmax import PRECISIONS

MIB = 1 << 20

# The server imports torch once; every measurement is a process that it forks.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "glintru_rec.losses"])


class Inputs:
    """Queries, items, the targets and their vectors."""

    def __init__(self, num_targets: int, num_items: int, width: int):
        self.query, self.items = (0.5 * torch.randn(size, width) for size in (num_targets, num_items))
        self.target_ids = torch.randint(num_items, (num_targets,))
        self.leaves = [self.query, self.items, self.items[self.target_ids]]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def num_bytes(self) -> int:
        """Count what the inputs, or their gradients, take."""
        return sum(4 * leaf.numel() for leaf in self.leaves)


def on_full_logits(inputs: Inputs) -> Tensor:
    """Compute the mean loss as everybody does."""
    return functional.cross_entropy(inputs.query @ inputs.items.t(), inputs.target_ids)


def in_blocks(inputs: Inputs, precision: str) -> Tensor:
    """Give the same by the project's loss."""
    query, items, aim = inputs.leaves
    return full_softmax(query, aim, items, 1.0, precision).mean()


def seconds(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> float:
    """Time one pass forward and backward."""
    for leaf in inputs.leaves:
        leaf.grad = None
    start = time.perf_counter()
    loss(inputs).backward()
    return time.perf_counter() - start


def memory(loss: Callable[[Inputs], Tensor], *sizes: int) -> str:
    """Measure in this process; give the line to print."""
    torch.set_num_threads(1)
    seconds(loss, Inputs(256, 1024, 8))  # libraries make their buffers at the first call
    inputs = Inputs(*sizes)
    held = inputs.num_bytes()
    beyond = highest_during(lambda: loss(inputs).backward()) - held
    return f"{sizes[1]:12,}{sizes[2]:6}{held / MIB:10,.1f}{held / MIB:13,.1f}{beyond / MIB:13,.1f}{1 + beyond / held / 2:9.2f}x"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growing", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--growing-width", type=int, default=8)
    given = parser.parse_args()
    ours, name = partial(in_blocks, precision=given.precision), f"in blocks, {given.precision}"

    print(f"T={given.targets}; memory in MiB, one thread")
    print(f"{'items':>12}{'width':>6}{'inputs':>10}{'their grads':>13}{'beyond both':>13}{'in all':>10}")
    rows = [(name, ours, size, given.growing_width) for size in given.growing]
    rows += [(name, ours, given.items, given.width), ("full logits", on_full_logits, given.items, given.width)]
    with processes.Pool(1, maxtasksperchild=1) as pool:
        for label, loss, num_items, width in rows:
            print(f"{pool.apply(memory, (loss, given.targets, num_items, width))}  {label}", flush=True)

    inputs = Inputs(given.targets, given.items, given.width)
    turns = [(seconds(ours, inputs), seconds(on_full_logits, inputs)) for _ in range(given.repeats + 1)][1:]  # one warms up
    own, full = (statistics.median(times) for times in zip(*turns))
    threads = f"{torch.get_num_threads()} threads"
    print(
        f"V={given.items:,}, D={given.width}, {threads}: {1e3 * own:,.0f} ms {name}, {1e3 * full:,.0f} ms on full logits: ",
        end="",
    )
    print(f"{own / full:.2f}x")


if __name__ == "__main__":
    main()
