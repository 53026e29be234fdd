"""Deal the chunks of an epoch out to ranks while they read: who runs out takes the next.

Which windows of a chunk make a batch is known to the rank that has read it alone. It tells the others; from then on all ranks
work out by themselves, and alike, how far each of them is, and who takes which chunk::

    chunk      0 ███████      3 █████          rank 0
               1 █████    2 ████████████       rank 1
                     ^ told: 5 batches, so rank 1 takes chunk 2 after 5 steps

The windows of a chunk do not depend on the rank that reads it, so neither does what an epoch consists of; nor do batches.
"""

from collections.abc import Sequence
from typing import NamedTuple

from glintru_rec.data.batches import START, Place


class Chunk(NamedTuple):
    """A chunk that a rank reads, or is to go on with."""

    number: int
    """Its place in the epoch."""
    windows: int = 0
    """Windows of it that are done."""
    num_windows: int | None = None
    """Windows of it in all; None until a rank has read it."""


class Deal:
    """Where every rank stands in an epoch; all ranks have the same.

    Args:
        num_chunks: of the epoch.
        world_size: number of ranks.
        place: where the epoch begins. With as many ranks as wrote it each goes on with its own chunk; with others, the first
            ranks go on with the chunks that were begun, and those that are left over are taken before any new one.
    """

    def __init__(self, num_chunks: int, world_size: int, place: Place = START):
        self.num_chunks, self.num_batches, self.next_chunk = num_chunks, place.batches, place.next_chunk
        begun: list[Chunk | None] = [chunk and Chunk(*chunk) for chunk in place.chunks]
        self.held = begun[:world_size] + [None] * (world_size - len(begun))
        self.waiting = [chunk for chunk in begun[world_size:] if chunk]
        self.ends: list[list[int]] = [[] for _ in self.held]  # of the batches that are left of each rank's chunk
        self._hand_out()

    @property
    def place(self) -> Place:
        """Where the epoch stands: the ranks' chunks, in the order of ranks, and those that wait."""
        return Place(self.num_batches, (*self.held, *self.waiting), self.next_chunk)

    @property
    def is_over(self) -> bool:
        """Whether no rank has a chunk left."""
        return not any(self.held)

    def learn(self, ends: Sequence[Sequence[int]]) -> None:
        """Take in before which windows the batches end that are left of each rank's chunk."""
        self.ends = [list(each) for each in ends]
        for rank, (chunk, own) in enumerate(zip(self.held, self.ends, strict=True)):
            self.held[rank] = chunk and chunk._replace(num_windows=own[-1] if own else chunk.windows)
        self._hand_out()

    def num_steps_known(self) -> int:
        """Count the steps until some rank takes another chunk; 0 where one has taken a chunk that is not known yet."""
        return min((len(ends) for chunk, ends in zip(self.held, self.ends, strict=True) if chunk), default=0)

    def step(self) -> None:
        """Note that every rank with a chunk has done a batch of it."""
        self.held = [chunk and chunk._replace(windows=ends.pop(0)) for chunk, ends in zip(self.held, self.ends, strict=True)]
        self.num_batches += sum(chunk is not None for chunk in self.held)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give a chunk, while there are any, to each rank that has none or is done with its own."""
        for rank, chunk in enumerate(self.held):
            if chunk is None or chunk.windows == chunk.num_windows:
                self.held[rank], self.ends[rank] = self._take(), []

    def _take(self) -> Chunk | None:
        if self.waiting:
            return self.waiting.pop(0)
        if self.next_chunk == self.num_chunks:
            return None
        self.next_chunk += 1
        return Chunk(self.next_chunk - 1)
