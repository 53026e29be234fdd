"""The processes of a run: their group, their device, their randomness."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist

from glintru_rec.errors import InputError


@contextmanager
def process_group(device: str, timeout_seconds: float | None = None) -> Iterator[torch.device]:
    """Join the process group that the launcher set up, or a group of one; leave it at the end.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout_seconds: how long a rank waits for the others before it fails; None: as long as torch does, 30 minutes.

    Yields:
        This rank's device. CUDA ranks talk over NCCL (and gloo for what lies on the CPU), others over gloo.
    """
    quiet_dependencies()
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", "0")):
        raise InputError(
            f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA device(s), one is needed per rank"
        )
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    this_device = torch.device("cpu")
    if use_cuda:
        this_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(this_device)
    if "RANK" in os.environ:  # started by torchrun
        store, rank, world_size = next(dist.rendezvous("env://"))
        # The agent's store outlives a restart: without a prefix a rank may read the address of a dead one and fail to connect.
        attempt = dist.PrefixStore(f"attempt-{restart_count()}", store)
        dist.init_process_group(backend, timeout=timeout, store=attempt, rank=rank, world_size=world_size)
    else:
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # torchrec warns without it
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield this_device
    finally:
        dist.destroy_process_group()


def restart_count() -> int:
    """Count how often torchelastic has restarted the ranks of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """Name this launch: the same in every rank and restart of it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "alone")


def quiet_dependencies() -> None:
    """Hide warnings that torch and torchrec raise about their own code, which a user could change nothing about."""
    for message in (
        ".*broadcast_buffers.*",
        ".*we are deprecating ShardedTensor.*",
        ".*torch.distributed is disabled.*",
        "Sparse CSR tensor support is in beta",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class StopSignals:
    """SIGTERM, which spot machines and schedulers send before they take a machine away, and SIGINT, which is Ctrl-C.

    Within the ``with`` either is noted instead of ending the process; a second SIGINT ends it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def any_rank_received(self) -> bool:
        """Whether this or another rank was to stop; all ranks ask together, and hear the same."""
        flag = torch.tensor([int(self.received is not None)], dtype=torch.int32)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def join_ids(ids: torch.Tensor) -> torch.Tensor:
    """Join the ranks' ids, int64 ``[N]`` on the CPU, in the order of ranks; N may differ from rank to rank."""
    return torch.cat(_gather(ids))


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """Give all ranks the int64 arrays of all, each ``[N]``, in the order of ranks; N may differ from rank to rank."""
    return [each.numpy() for each in _gather(torch.from_numpy(array))]


def _gather(numbers: torch.Tensor) -> list[torch.Tensor]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([numbers.numel()]))
    most = int(max(sizes))
    padded = [numbers.new_empty(most) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(numbers, (0, most - numbers.numel())))
    return [each[:size] for each, size in zip(padded, sizes, strict=True)]


def sum_counts(counts: np.ndarray) -> np.ndarray:
    """Sum an array over the ranks, in place."""
    dist.all_reduce(torch.from_numpy(counts))
    return counts


def seed_step(seed: int, step: int, rank: int) -> None:
    """Restart torch's generators for one step of one rank.

    All randomness of a step follows from (seed, step, rank): a resumed run draws what it would have drawn, with no
    generator state to save.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
