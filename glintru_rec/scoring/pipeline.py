"""The stages of a job, at work at once: bounded queues between them, results in the order of the input.

::

    reader thread ──at most READ_AHEAD batches──▶ N model threads ──at most N + 1 batches──▶ writer (the calling thread)

So a job holds at most ``READ_AHEAD + N + 2`` batches, however large its input is.

Every model thread runs whole batches, and each operation of torch on itself alone. That is what makes scores independent of
the number of threads, to the bit: an operation that several threads share is cut at places that depend on their number, and
vectorised kernels round the rest of a cut otherwise than its middle.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

READ_AHEAD = 2
_END: Any = object()
_LOCK = threading.Lock()

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread_each(device: str) -> Iterator[int]:
    """Let every thread run torch's operations by itself, instead of sharing each of them.

    Args:
        device: ``cpu``, or a CUDA device, which one thread keeps busy.

    Yields:
        Threads to run batches in: as many as torch had for an operation, and one for a CUDA device.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that it starts
    try:
        yield before if device == "cpu" else 1
    finally:
        torch.set_num_threads(before)


def read_ahead(source: Iterator[Item]) -> Iterator[Item]:
    """Draw from an iterator in a thread of its own, at most `READ_AHEAD` items ahead of the one who asks.

    An error of the source is raised where its item would have been.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, source, _END) for _ in range(READ_AHEAD))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, source, _END))
            yield item


def map_in_order(function: Callable[[Item], Result], source: Iterator[Item], num_threads: int) -> Iterator[Result]:
    """Apply a function in several threads; give the results in the order of the source.

    At most ``num_threads + 1`` items are drawn from the source whose results were not asked for.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in source:
            pending.append(pool.submit(function, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the context to ``seconds[stage]``; threads may do so at once."""
    start = time.perf_counter()
    try:
        yield
    finally:
        taken = time.perf_counter() - start
        with _LOCK:
            seconds[stage] += taken
