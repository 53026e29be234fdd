"""Training batches of a dataset that is not in memory: each rank reads some row groups at a time.

The row groups of all parts are shuffled by (seed, epoch) and cut into chunks of ``row_groups_held``. The windows of a chunk
are shuffled together and packed into batches by (seed, epoch, chunk), as `TrainingBatches` does for a whole dataset; `Deal`
says which rank reads which chunk. So an epoch has the same batches on any number of ranks.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from glintru_rec.data.batches import START, Batch, Place, TrainingBatches
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.data.reader_deal import Chunk, Deal
from glintru_rec.errors import InputError


class Ranks(NamedTuple):
    """The ranks that read a dataset together, and how they bring together what each knows."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda numbers: [numbers]
    """Give all ranks the int64 arrays of all, in the order of ranks; their lengths may differ."""
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts
    """Sum an array over the ranks."""


ALONE = Ranks()


class _OpenChunk(NamedTuple):
    """A chunk in memory."""

    epoch: int
    number: int
    batches: TrainingBatches | None
    """None where it has no target."""

    def bounds(self, first: int) -> list[int]:
        """Say where batches begin, from window ``first`` on, and where the last one ends."""
        return self.batches.bounds(self.epoch, first) if self.batches else [0]


class RowGroupBatches:
    """What `TrainingBatches` is for a dataset in memory, for one on the disk.

    Every target of an epoch is trained on once, on whatever ranks, and across a resume with batches of whatever size. Windows
    of one batch come from the same ``dataset.row_groups_held`` row groups. Ranks that have no chunk left at an epoch's end get
    empty batches.

    Args:
        dataset: opened; every rank has all of it before it.
        max_seq_len: as for `TrainingBatches`, like those after it.
        batch_targets: most targets in one rank's batch.
        seed: of the order of row groups, the shuffle and the cuts.
        ranks: of which this is one.
        every_position: whether each item is a target.
        reversed_share: share of the windows that are read backwards ...
        reversed_epochs: ... in this many epochs at the start.

    Attributes:
        place: where the epoch stands, on all ranks, once the batch that was given last is trained on.
        given: that batch's chunk and its windows there, as in `TrainingBatches.given`; empty for a batch of no chunk.

    Raises:
        InputError: there are fewer chunks than ranks.
    """

    def __init__(
        self,
        dataset: RowGroupDataset,
        max_seq_len: int,
        batch_targets: int,
        seed: int,
        ranks: Ranks = ALONE,
        every_position: bool = True,
        reversed_share: float = 0.0,
        reversed_epochs: int = 0,
    ):
        self.dataset, self.ranks, self.seed = dataset, ranks, seed
        self.max_seq_len, self.batch_targets, self.every_position = max_seq_len, batch_targets, every_position
        self.reversed_share, self.reversed_epochs = reversed_share, reversed_epochs
        self.num_chunks = -(-len(dataset.row_groups) // dataset.row_groups_held)
        if self.num_chunks < ranks.world_size:
            raise InputError(
                f"the dataset has {len(dataset.row_groups)} row groups, {self.num_chunks} times data.row_groups_held="
                f"{dataset.row_groups_held}, too few for {ranks.world_size} ranks: lower it, or take data.reader=memory"
            )
        self.place = START
        self.given: tuple[int, ...] = ()
        self.open_chunk: _OpenChunk | None = None
        self.counts: dict[str, np.ndarray] = {}
        self.weights: tuple[int, np.ndarray] | None = None  # events of the chunks of the epoch asked for last

    def fingerprint(self) -> str:
        """Hash all that decides the order of an epoch's windows; not the size of batches, nor the number of ranks."""
        decisive = (self.seed, self.max_seq_len, self.every_position)
        turned = (self.reversed_share, self.reversed_epochs)
        sizes = [(group.num_users, group.num_events) for group in self.dataset.row_groups]
        return hashlib.sha256(repr((*decisive, *turned, self.dataset.row_groups_held, sizes)).encode()).hexdigest()[:16]

    def epoch(self, epoch: int, place: Place = START) -> Iterator[Batch]:
        """Yield this rank's batches of one epoch from ``place`` on; every rank yields equally many.

        All ranks read an epoch together: each time that one has read a chunk they tell each other.

        Raises:
            InputError: a file cannot be read, or no sequence has two items.
        """
        deal, rank = Deal(self.num_chunks, self.ranks.world_size, place), self.ranks.rank
        self.place = deal.place
        while not deal.is_over:
            self._open(epoch, deal.held[rank])
            chunk = deal.held[rank]
            bounds = self.open_chunk.bounds(chunk.windows) if self.open_chunk and chunk else [0]
            deal.learn([ends.tolist() for ends in self.ranks.gather(np.array(bounds[1:], np.int64))])
            has_batches = deal.held[rank] is not None  # the chunk may have turned out to have no target
            for number in range(deal.num_steps_known()):
                self.given = (chunk.number, bounds[number], bounds[number + 1]) if chunk and has_batches else ()
                deal.step()
                self.place = deal.place
                yield self._batch(epoch)
        if not deal.num_batches:
            raise InputError("the dataset has no training sequence of two items or more")

    def num_steps(self, epoch: int, place: Place = START) -> int:
        """Estimate the steps of an epoch from ``place`` on: how full batches get is seen when they are made."""
        dataset = self.dataset
        targets = dataset.manifest["num_events"] - dataset.num_users - 2 * dataset.num_cases
        targets = targets if self.every_position else dataset.num_cases
        left = (1 - self.share_done(epoch, place)) * targets
        return int(np.ceil(left / (self.batch_targets * self.ranks.world_size)))

    def share_done(self, epoch: int, place: Place) -> float:
        """Give the share of an epoch, by events, that lies before ``place``, from 0 to 1."""
        events = self._events_of_chunks(epoch)
        done = events[: place.next_chunk].sum()
        for chunk in (Chunk(*chunk) for chunk in place.chunks if chunk):
            done -= events[chunk.number] * (1 - chunk.windows / chunk.num_windows if chunk.num_windows else 1)
        return float(done / events.sum())

    def look_up(self, epoch: int, number: int, first: int, stop: int) -> tuple[Batch, np.ndarray]:
        """Read a chunk again: give the batch of some windows, and which users of the dataset they are of: int64 ``[B]``."""
        groups = self._chunk(epoch, number)
        batches = self._pack(groups, number)
        assert batches is not None, "a batch was made of it"
        found, sequences = batches.look_up(epoch, first, stop)
        first_users = self.dataset.first_users
        users = [first_users[group] + np.arange(self.dataset.row_groups[group].num_users) for group in groups]
        return found, np.concatenate(users)[sequences]

    def event_counts(self, num_items: int) -> np.ndarray:
        """Count the training events of every item: int64 ``[num_items]``. Each rank reads its share of the dataset, once."""
        if "events" not in self.counts:
            self.counts["events"] = self.ranks.total(self.dataset.train_counts(self._own_groups))
        return self.counts["events"]

    def target_counts(self, num_items: int, epoch: int) -> np.ndarray:
        """Count how often each item is expected to be a target in an epoch: float64 ``[num_items]``.

        Each rank reads its share of the dataset: once for the epochs that read backwards, once for the others.
        """
        name = "targets, some backwards" if epoch < self.reversed_epochs else "targets"
        if name not in self.counts:
            counts = np.zeros(num_items)
            for group in self._own_groups:
                batches = self._pack([group])
                if batches is not None:
                    np.add.at(counts, batches.items, batches.target_shares(epoch))
            self.counts[name] = self.ranks.total(counts)
        return self.counts[name]

    @property
    def _own_groups(self) -> range:
        return range(self.ranks.rank, len(self.dataset.row_groups), self.ranks.world_size)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset.row_groups))

    def _chunk(self, epoch: int, number: int) -> list[int]:
        """List the row groups of a chunk."""
        held = self.dataset.row_groups_held
        return self._order(epoch)[number * held : (number + 1) * held].tolist()

    def _events_of_chunks(self, epoch: int) -> np.ndarray:
        if self.weights is None or self.weights[0] != epoch:
            events = np.array([group.num_events for group in self.dataset.row_groups])[self._order(epoch)]
            self.weights = epoch, np.add.reduceat(events, np.arange(0, events.size, self.dataset.row_groups_held))
        return self.weights[1]

    def _open(self, epoch: int, chunk: Chunk | None) -> None:
        """Read the chunk that this rank is to go on with, unless it is the one in memory."""
        if chunk is None:
            self.open_chunk = None
        elif self.open_chunk is None or (self.open_chunk.epoch, self.open_chunk.number) != (epoch, chunk.number):
            self.open_chunk = None  # before the next is read: never two at a time
            self.open_chunk = _OpenChunk(epoch, chunk.number, self._pack(self._chunk(epoch, chunk.number), chunk.number))

    def _batch(self, epoch: int) -> Batch:
        """Make the batch that is given, of the chunk in memory, or an empty one."""
        if not self.given:
            num_side = len(self.dataset.side.names)
            side_ids = torch.zeros(0, num_side, dtype=torch.int64) if num_side else None
            nothing, bounds = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            return Batch(nothing, bounds, side_ids, self.dataset.vocabulary.item_ids)
        assert self.open_chunk is not None
        assert self.open_chunk.batches is not None
        return self.open_chunk.batches.batch(epoch, *self.given[1:])

    def _pack(self, groups: Sequence[int], number: int = 0) -> TrainingBatches | None:
        """Read row groups, and make batches of their training sequences by the randomness of chunk ``number``."""
        dataset = self.dataset.read(groups)
        items, offsets = dataset.train_sequences()
        if not (np.diff(offsets) > 1).any():
            return None
        return TrainingBatches(
            items,
            offsets,
            self.max_seq_len,
            self.batch_targets,
            self.seed,
            every_position=self.every_position,
            reversed_share=self.reversed_share,
            reversed_epochs=self.reversed_epochs,
            stream=(1 + number,),  # 0 would be the row groups' own
            side_ids=dataset.train_side_ids(),
            ids=dataset.vocabulary.item_ids,
        )
