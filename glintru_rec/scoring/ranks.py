"""The ranks of a scoring job: who scores which files, and what they tell each other.

A file is scored by one rank, by itself: nothing is exchanged while rows are scored (but for ``catalog=split``, see `split`),
so the output is that of one process and ranks wait for each other only at the end.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from glintru_rec.errors import InputError

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """Give this process's rank and the number of ranks: 0 and 1 where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first(work: Callable[[], Value]) -> Value:
    """Do something on the first rank alone; all ranks get its result, or raise its `InputError`."""
    rank, size = rank_and_size()
    if size == 1:
        return work()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except InputError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]


def from_all(value: Value) -> list[Value]:
    """Give every rank's value, in the order of ranks."""
    _, size = rank_and_size()
    values: list[Any] = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(sizes: dict[str, int], num_ranks: int) -> list[list[str]]:
    """Deal out files by their rows: the largest first, each to the rank that has the least.

    Args:
        sizes: rows of each file, by its name.
        num_ranks: at least 1.

    Returns:
        The names for each rank, in the order of ``sizes``.
    """
    shares: list[set[str]] = [set() for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        shares[least].add(name)
        loads[least] += sizes[name]
    return [[name for name in sizes if name in share] for share in shares]
