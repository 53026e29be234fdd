"""Training batches that hold a number of targets, whatever the lengths of the sequences.

A batch that held a number of sequences would, under a mean loss, weigh each target of a batch of short histories many
times more than one of a batch of long histories. Here every target of an epoch is trained on once and weighs the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from glintru_rec.config import check
from glintru_rec.errors import InputError


class Batch(NamedTuple):
    """Sequences of at least two items each; every item but a sequence's first is a target (see `SequenceModel`)."""

    item_ids: Tensor
    """int64 ``[T]``."""
    offsets: Tensor
    """int64 ``[B + 1]``."""
    side_ids: Tensor | None = None
    """Side features of the items' events, int64 ``[T, F]``; None where none are read."""
    ids: pa.Array | None = None
    """Original ids of which the items are the places; None where they are rows of a table."""


class Place(NamedTuple):
    """How far an epoch is trained on, all ranks together: what a run that goes on begins with."""

    batches: int = 0
    """Batches done, of all ranks."""
    chunks: Sequence[Any] = ()
    """Chunks begun and not done: of each its number, how many of its windows are done and how many there are
    (`glintru_rec.data.reader_deal.Chunk`). A dataset in memory is one chunk. The windows and their order follow from seed and
    epoch, whatever the batches that they are packed into."""
    next_chunk: int = 0
    """The first chunk that nobody has begun."""


START = Place()


class _Windows(NamedTuple):
    """The windows of an epoch in their shuffled order."""

    starts: np.ndarray
    """Row of ``items`` where each starts."""
    lengths: np.ndarray
    """Its number of items."""
    backwards: np.ndarray
    """Whether it is read backwards."""
    sizes: np.ndarray
    """The number of targets that it counts for in a batch, summed up to and with it."""


class TrainingBatches:
    """Cut training sequences into windows, shuffle them, and pack them into batches by number of targets.

    A sequence with more targets than ``max_seq_len`` is cut into windows that share their border item, so that every
    item but the first is a target exactly once an epoch; where the cuts fall changes from epoch to epoch. Everything
    follows from (seed, epoch): a resumed run sees the batches that it would have seen. One resumed on other ranks, or with
    batches of another size, goes on with the epoch's next window.

    Args:
        items: item ids of all training sequences, int64 ``[E]``.
        offsets: int64 ``[U + 1]``.
        max_seq_len: most items that the encoder reads for one target.
        batch_targets: most targets in one rank's batch; at least ``max_seq_len``.
        seed: of the shuffle and the cuts.
        rank: of this process.
        world_size: number of processes; batch i from the place where the epoch begins goes to rank ``i % world_size``.
        every_position: whether each item is a target (causal encoders). Otherwise an epoch has one target per
            sequence: the last item of a prefix whose end is drawn anew each epoch.
        reversed_share: share of the windows that are read backwards, drawn anew each epoch ...
        reversed_epochs: ... in this many epochs at the start. Items that occur together teach in both directions; the
            epochs after these teach the true order.
        stream: tells the randomness of these sequences from that of others with the same seed and epoch.
        side_ids: side features of the items' events, integers ``[E, F]``; None where none are read.
        ids: original ids of which the items are the places; batches have them beside their items.

    Attributes:
        place: where the epoch stands once the batch that was given last is trained on.
        given: the windows of that batch, the first and the one behind the last, for `look_up`.
    """

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        max_seq_len: int,
        batch_targets: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        every_position: bool = True,
        reversed_share: float = 0.0,
        reversed_epochs: int = 0,
        stream: tuple[int, ...] = (),
        side_ids: np.ndarray | None = None,
        ids: pa.Array | None = None,
    ):
        check("trainer.batch_targets", batch_targets, batch_targets >= 1, "at least 1")
        if batch_targets < max_seq_len and every_position:
            raise InputError(
                f"trainer.batch_targets is {batch_targets}, less than data.max_seq_len {max_seq_len}: "
                "a window of one user would not fit into a batch"
            )
        self.items, self.offsets = items, offsets
        self.side_ids, self.ids = side_ids, ids
        self.max_seq_len, self.batch_targets = max_seq_len, batch_targets
        self.seed, self.rank, self.world_size, self.every_position = seed, rank, world_size, every_position
        self.reversed_share, self.reversed_epochs = reversed_share, reversed_epochs
        self.stream = stream
        self.place, self.given = START, (0, 0)
        self.shuffled: tuple[int, _Windows] | None = None  # the windows of the epoch asked for last
        lengths = np.diff(offsets)
        self.starts, self.num_targets = offsets[:-1][lengths > 1], lengths[lengths > 1] - 1
        if not self.num_targets.size:
            raise InputError("the dataset has no training sequence of two items or more")

    def fingerprint(self) -> str:
        """Hash all that decides the order of an epoch's windows; not the size of batches, nor the number of ranks."""
        decisive = (self.seed, self.max_seq_len, self.every_position)
        turned = (self.reversed_share, self.reversed_epochs)
        return hashlib.sha256(repr((*decisive, *turned, self.items.size, self.num_targets.size)).encode()).hexdigest()[:16]

    def epoch(self, epoch: int, place: Place = START) -> Iterator[Batch]:
        """Yield this rank's batches of one epoch from ``place`` on; every rank yields equally many.

        Where batches do not divide evenly among ranks, the last ones are empty.
        """
        bounds = self.bounds(epoch, _windows_done(place))
        last = len(bounds) - 1
        for begin in range(0, last, self.world_size):
            end = min(begin + self.world_size, last)
            own = min(begin + self.rank, end)
            self.place = Place(place.batches + end, ((0, bounds[end], bounds[-1]),), 1)
            self.given = (bounds[own], bounds[min(own + 1, end)])
            yield self.batch(epoch, *self.given)

    def bounds(self, epoch: int, first: int = 0) -> list[int]:
        """Say where batches begin if they are packed from window ``first`` on: at windows, and last behind the last window.

        Of any of these bounds on, the batches are the same.
        """
        sizes = self._shuffle(epoch).sizes
        bounds, used = [first], sizes[first - 1] if first else 0
        while bounds[-1] < sizes.size:
            bounds.append(int(np.searchsorted(sizes, used + self.batch_targets, side="right")))
            used = sizes[bounds[-1] - 1]
        return bounds

    def num_windows(self, epoch: int) -> int:
        """Count the windows of an epoch."""
        return self._shuffle(epoch).sizes.size

    def num_batches(self, epoch: int, first: int = 0) -> int:
        """Count the batches of an epoch from window ``first`` on, those of all ranks together."""
        return len(self.bounds(epoch, first)) - 1

    def num_steps(self, epoch: int, place: Place = START) -> int:
        """Count the steps of an epoch from ``place`` on."""
        return -(-self.num_batches(epoch, _windows_done(place)) // self.world_size)

    def share_done(self, epoch: int, place: Place) -> float:
        """Give the share of an epoch's windows that lies before ``place``, from 0 to 1."""
        return _windows_done(place) / self.num_windows(epoch)

    def look_up(self, epoch: int, first: int, stop: int) -> tuple[Batch, np.ndarray]:
        """Give the batch of the windows from ``first`` up to ``stop``, and which of the training sequences they come from.

        Returns:
            The batch, and int64 ``[B]``.
        """
        starts = self._shuffle(epoch).starts[first:stop]
        return self.batch(epoch, first, stop), np.searchsorted(self.offsets, starts, side="right") - 1

    def event_counts(self, num_items: int) -> np.ndarray:
        """Count the training events of every item: int64 ``[num_items]``."""
        return np.bincount(self.items, minlength=num_items)

    def target_counts(self, num_items: int, epoch: int) -> np.ndarray:
        """Count how often each item is expected to be a target in an epoch: float64 ``[num_items]``."""
        return np.bincount(self.items, self.target_shares(epoch), num_items)

    def target_shares(self, epoch: int) -> np.ndarray:
        """Say of every event how often it is expected to be a target in an epoch: float64 ``[E]``."""
        lengths = np.diff(self.offsets)
        place, last = np.arange(self.items.size) - np.repeat(self.offsets[:-1], lengths), np.repeat(lengths - 1, lengths)
        forwards, backwards = place > 0, place < last
        if not self.every_position:  # each end of a prefix is as likely; read backwards, its first item is the target
            kept = np.minimum(last, self.max_seq_len)
            forwards = forwards / np.maximum(last, 1)
            backwards = np.where(place == 0, kept, place <= last - kept) / np.maximum(last, 1)
        share = self._reversed_share(epoch)
        return (1 - share) * forwards + share * backwards

    def _reversed_share(self, epoch: int) -> float:
        return self.reversed_share if epoch < self.reversed_epochs else 0.0

    def _shuffle(self, epoch: int) -> _Windows:
        if self.shuffled is None or self.shuffled[0] != epoch:  # seconds for many windows, and asked for several times an epoch
            self.shuffled = epoch, self._shuffle_anew(epoch)
        return self.shuffled[1]

    def _shuffle_anew(self, epoch: int) -> _Windows:
        rng = np.random.default_rng([self.seed, epoch, *self.stream])
        starts, num_targets = self._windows(rng) if self.every_position else self._prefixes(rng)
        order = rng.permutation(starts.size)
        starts, num_targets = starts[order], num_targets[order]
        backwards = rng.random(starts.size) < self._reversed_share(epoch)
        sizes = np.cumsum(num_targets if self.every_position else np.ones_like(num_targets))
        return _Windows(starts, num_targets + 1, backwards, sizes)

    def _windows(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Cut all sequences: (row of ``items`` where each window starts, its number of targets)."""
        size = self.max_seq_len
        first = np.where(self.num_targets > size, rng.integers(1, size + 1, self.num_targets.size), self.num_targets)
        count = 1 + -(-(self.num_targets - first) // size)
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of a window in its sequence
        first, total = np.repeat(first, count), np.repeat(self.num_targets, count)
        begin = np.where(number == 0, 0, first + (number - 1) * size)
        end = np.minimum(first + number * size, total)
        return np.repeat(self.starts, count) + begin, end - begin

    def _prefixes(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw one prefix of each sequence, cut to its last ``max_seq_len`` items and the target."""
        target = rng.integers(1, self.num_targets + 1)
        kept = np.minimum(target, self.max_seq_len)
        return self.starts + target - kept, kept

    def batch(self, epoch: int, first: int, stop: int) -> Batch:
        """Make the batch of the windows of an epoch from ``first`` up to ``stop``; empty where they are the same."""
        windows = self._shuffle(epoch)
        starts, lengths, backwards = (each[first:stop] for each in (windows.starts, windows.lengths, windows.backwards))
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        place = np.where(np.repeat(backwards, lengths), np.repeat(lengths, lengths) - 1 - place, place)
        rows = np.repeat(starts, lengths) + place
        side_ids = None if self.side_ids is None else torch.from_numpy(self.side_ids[rows].astype(np.int64))
        return Batch(torch.from_numpy(self.items[rows]), torch.from_numpy(offsets), side_ids, self.ids)


def _windows_done(place: Place) -> int:
    """Count the windows that are done of an epoch of a dataset in memory."""
    return place.chunks[0][1] if place.chunks else 0
