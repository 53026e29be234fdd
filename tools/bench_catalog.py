"""What a catalog's size costs: step time, peak memory and start of training on 1M to 100M items.

python tools/bench_catalog.py [--items 1e6 1e7 5e7 1e8] [--ranks 1 2] [--turns 8] [--memory-gib 20]
                              [--figures benchmarks.csv] [OVERRIDES]

A step is that of `Trainer.train_step` with the default config (sampled softmax over 1024 uniform negatives) but for fp16 rows;
histories are uniform over the catalog, so that hardly a row is in a cache. Sizes that fit into memory together take turns of
some steps, each size in processes of its own; the smallest takes part in every round, and ratios are to it, in the same round.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bench_common import note, percentiles
from rich.console import Console
from rich.table import Table

from glintru_rec.config import compose
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import NegativeSampler, Uniform, sampled_softmax
from glintru_rec.tables.plan import describe_plan
from glintru_rec.tables.sharding import build_optimizer
from glintru_rec.training.build import build_distributed
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.summary import peak_memory

GIB = 2**30
WIDTH = 64
SEQUENCES, LENGTH = 8, 65  # 512 targets, as many as a batch of the defaults
PROCESS_BYTES = GIB // 2  # of a rank before it has a table: torch, torchrec, fbgemm
WARM_UP = 3


class Training:
    """Train on synthetic histories, one batch a call; on every rank of a group."""

    def __init__(self, num_items: int, config: TrainConfig, device: torch.device):
        start = time.perf_counter()
        self.num_items, self.config, self.rank = num_items, config, int(os.environ.get("RANK", "0"))
        self.model = build_distributed(config, num_items, device)
        self.optimizer = build_optimizer(self.model, config.table, lambda groups: torch.optim.AdamW(groups, fused=True))
        self.sampler = NegativeSampler(Uniform(num_items), config.loss.num_negatives)
        self.offsets = offsets_from_lengths(torch.full((SEQUENCES,), LENGTH))
        self.model.train()
        self.start_seconds = time.perf_counter() - start

    def step(self) -> tuple[float, int]:
        """Take a step; give its seconds, and the number of rows that it had to look up."""
        item_ids = torch.randint(self.num_items, (SEQUENCES * LENGTH,))
        start = time.perf_counter()
        self.optimizer.zero_grad()
        negative_ids, log_q, _ = self.sampler.draw(item_ids)
        output = self.model(item_ids, self.offsets, negative_ids)
        losses = sampled_softmax(
            output.query, output.positive, output.negatives, output.target_ids, negative_ids, log_q, aim=output.aim
        )
        (losses.sum() / losses.numel()).backward()
        self.optimizer.step()
        return time.perf_counter() - start, torch.cat([item_ids, negative_ids]).unique().numel()


def serve(pipe: Connection, num_items: int, overrides: list[str], threads: int, environment: dict[str, str]) -> None:
    """Be a rank: make ready, then take as many steps as the parent asks for, until it asks for none."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    fixed = ["data.path=.", "output=.", f"model.embedding_dim={WIDTH}", "table.dtype=fp16"]
    config = compose("train", TrainConfig, [*overrides, *fixed])
    with process_group("cpu") as device:
        training = Training(num_items, config, device)
        plan = describe_plan(training.model, config.table)
        pipe.send((training.start_seconds, plan["bytes_per_rank"][training.rank]))
        torch.manual_seed(training.rank)
        while num_steps := pipe.recv():
            pipe.send([training.step() for _ in range(num_steps)])
        pipe.send(peak_memory(device)["peak_memory_bytes"])


class Group:
    """The ranks that train on one catalog; alive, and idle until they are asked for steps."""

    def __init__(self, num_items: int, num_ranks: int, overrides: list[str]):
        self.num_items, self.num_ranks = num_items, num_ranks
        self.seconds: list[float] = []
        self.rows: list[int] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = max(1, torch.get_num_threads() // num_ranks)
        context = multiprocessing.get_context("fork")
        self.pipes, self.ranks = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            sizes = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in {**sizes, **where}.items()}
            process = context.Process(target=serve, args=(theirs, num_items, overrides, threads, environment), daemon=True)
            process.start()
            theirs.close()  # so that a rank that dies is seen as the end of its pipe
            self.pipes.append(ours)
            self.ranks.append(process)
        ready = [pipe.recv() for pipe in self.pipes]
        self.start_seconds = max(seconds for seconds, _ in ready)
        self.table_bytes = max(table_bytes for _, table_bytes in ready)
        self._steps(WARM_UP)

    def _steps(self, num_steps: int) -> list[list[tuple[float, int]]]:
        for pipe in self.pipes:
            pipe.send(num_steps)
        return [pipe.recv() for pipe in self.pipes]

    def take_turn(self, num_steps: int) -> None:
        """Take some steps; a step lasts as long as on its slowest rank."""
        for ranks in zip(*self._steps(num_steps)):
            self.seconds.append(max(seconds for seconds, _ in ranks))
            self.rows.append(sum(rows for _, rows in ranks))

    def end(self) -> None:
        """End the ranks; note the most memory that one of them has held."""
        for pipe in self.pipes:
            pipe.send(0)
        self.peak_bytes = max(pipe.recv() for pipe in self.pipes)
        for rank in self.ranks:
            rank.join()

    def fewest_bytes(self) -> float:
        """Bytes that a step must move, whatever it does: each row read, then read and written by the update, its step size too.

        Rows are fp16, step sizes fp32 (row-wise Adagrad). What another rank holds costs an id on the way there, and a row and
        its gradient, fp32, between the two.
        """
        in_table = 3 * 2 * WIDTH + 2 * 4
        between_ranks = (1 - 1 / self.num_ranks) * (8 + 2 * 4 * WIDTH)
        return statistics.mean(self.rows) * (in_table + between_ranks)


def plan_rounds(sizes: list[int], num_ranks: int, memory_bytes: float) -> list[list[int]]:
    """Put sizes together that fit into memory at once; the smallest is in every round."""
    base, *others = sorted(sizes)

    def needed(items: list[int]) -> int:
        return sum(size * (2 * WIDTH + 4) + num_ranks * PROCESS_BYTES for size in items)

    rounds = [[base]]
    for size in others:
        if needed([base, size]) > memory_bytes:
            raise SystemExit(f"{size:,} items beside {base:,} need {needed([base, size]) / GIB:.1f} GiB; --memory-gib is less")
        if needed([*rounds[-1], size]) > memory_bytes:
            rounds.append([base])
        rounds[-1].append(size)
    return rounds


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=float, nargs="+", default=[1e6, 1e7, 5e7, 1e8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of one turn")
    parser.add_argument("--memory-gib", type=float, default=20.0, help="that all sizes of a round may take together")
    parser.add_argument("--figures", type=Path, help="csv file to add the figures to, for tools/draw_catalog.py")
    parser.add_argument("overrides", nargs="*", help="of the training config, such as model=lru_rec")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.items]
    figures: list[dict[str, object]] = []
    table = Table("items", "ranks", "p20", "p50", "p80, ms", "ratio", "fewest MB a step", "start, s", "table GiB", "peak GiB")
    for num_ranks in arguments.ranks:
        for items in plan_rounds(sizes, num_ranks, arguments.memory_gib * GIB):
            groups = [Group(size, num_ranks, arguments.overrides) for size in items]
            for _ in range(arguments.turns):
                for group in groups:
                    group.take_turn(arguments.steps)
            base = statistics.median(groups[0].seconds)
            for group in groups:
                group.end()
                p20, p50, p80 = (1e3 * p for p in percentiles(group.seconds))
                ratio = p50 / 1e3 / base
                times = [f"{p20:.1f}", f"{p50:.1f}", f"{p80:.1f}", f"{ratio:.3f}"]
                rest = [f"{group.fewest_bytes() / 1e6:.2f}", f"{group.start_seconds:.1f}"]
                memory = [f"{group.table_bytes / GIB:.3f}", f"{group.peak_bytes / GIB:.2f}"]
                table.add_row(f"{group.num_items:,}", str(num_ranks), *times, *rest, *memory)
                said = {"items": group.num_items, "ranks": num_ranks, "p50_ms": p50, "ratio": ratio}
                name = f"{group.num_items:,} items, {num_ranks} ranks"
                figures.append({"name": name, **said, "start_s": group.start_seconds, "peak_gib": group.peak_bytes / GIB})
            table.add_section()
    print(f"D={WIDTH}, fp16 rows; {arguments.turns} turns of {arguments.steps} steps; start and memory of the fullest rank")
    Console(width=120).print(table)
    note("bench_catalog", figures, arguments.figures)


if __name__ == "__main__":
    main()
