"""Batches of a ranking dataset: examples beside the histories that they share.

A causal encoder gives in one pass what each of a user's examples may see, so examples that follow one another share a history::

    user's events        a b c d e f g h             examples to predict: e f g h (one block)
    history, encoded     a b c d e f g
    candidates                   e f g h             the items of the examples
    seen                         4 5 6 7             how many events of the history each may look at

An impression log with one example for each history is the same layout with blocks of one.

Shapes: B examples, S histories, T events in them, E events of the dataset.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from glintru_rec.errors import InputError
from glintru_rec.ranking.dataset import ITEM, SPLITS, Lists, RankingDataset
from glintru_rec.ranking.tower import CANDIDATE


@dataclass
class RankingBatch:
    """What a `RankingModel` reads, and what it should have said.

    Attributes:
        dense: float32 ``[B, F]``.
        sparse: pooled features; stride B. Empty where the dataset has none.
        histories: the sequence features, and the candidates under `CANDIDATE`; stride S. The examples stand in the order of
            the candidates.
        seen: events of its history that an example may look at, int64 ``[B]``.
        labels: float32 ``[B, K]``, NaN where there is none.
        examples: places in the dataset, int64 ``[B]``.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    histories: KeyedJaggedTensor
    seen: Tensor
    labels: Tensor
    examples: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "RankingBatch":
        """Copy to a device."""
        return RankingBatch(
            **{each.name: getattr(self, each.name).to(device=device, non_blocking=non_blocking) for each in fields(self)}
        )


class _Block(NamedTuple):
    start: int
    """First example, a place in the dataset."""
    stop: int
    """Behind the last."""


class RankingBatches:
    """The batches of one period, on one rank.

    Every rank takes the same number of steps, with at least one block in each.

    Attributes:
        longest_history: most events of a shared history: about ``max_seq_len + block_examples``, more where a user has many
            events of one time, none of which saw the others.

    Args:
        dataset: opened.
        split: ``train``, ``valid`` or ``test``.
        max_seq_len: every example sees at least so many of its latest events, where its user has them.
        block_examples: most examples that share a history.
        batch_examples: examples of a rank's batch, about: blocks stay whole.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        InputError: no event of the period has a label.
    """

    def __init__(
        self,
        dataset: RankingDataset,
        split: str,
        max_seq_len: int,
        block_examples: int,
        batch_examples: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.max_seq_len = dataset, max_seq_len
        self.rank, self.world_size = rank, world_size
        chosen = np.flatnonzero((dataset.split == SPLITS.index(split)) & ~np.isnan(dataset.labels).all(axis=1))
        if not len(chosen):
            raise InputError(f"no event of the {split} period has a label of {', '.join(dataset.manifest['tasks'])}")
        self.num_examples = len(chosen)
        self.blocks = list(_blocks(chosen, dataset.user, block_examples))
        starts, stops = np.array(self.blocks).T
        self.longest_history = int((dataset.seen[stops - 1] - self._skipped(starts)).max())
        self.num_steps = max(1, round(self.num_examples / (batch_examples * world_size)))
        self.num_steps = max(1, min(self.num_steps, len(self.blocks) // world_size))

    def epoch(self, seed: int | None = None, epoch: int = 0) -> Iterator[RankingBatch]:
        """Give this rank's batches: shuffled as seed and epoch say, or in order.

        Where the blocks do not divide among the ranks, some come twice in the epoch.
        """
        order = np.arange(len(self.blocks))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(order)
        order = np.resize(order, max(-(-len(order) // self.world_size) * self.world_size, self.world_size))
        shares = [np.array_split(order[rank :: self.world_size], self.num_steps) for rank in range(self.world_size)]
        for step in range(self.num_steps):
            batches = [[self.blocks[place] for place in share[step]] for share in shares]
            size = max(sum(block.stop - block.start for block in blocks) for blocks in batches)
            yield self.make_batch(batches[self.rank], size)

    def make_batch(self, blocks: list[_Block], size: int) -> RankingBatch:
        """Gather the examples of some blocks and the histories that they look at.

        Args:
            blocks: at least one.
            size: examples B to give. TorchRec needs as many on every rank where pooled tables are spread by rows, so the last
                example is repeated, without labels, until there are.
        """
        data = self.dataset
        examples = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
        per_block = np.array([block.stop - block.start for block in blocks])
        repeated = size - len(examples)
        examples = np.append(examples, np.full(repeated, examples[-1]))
        per_block[-1] += repeated
        labels = data.labels[examples]
        labels[size - repeated :] = np.nan
        starts, stops = np.array(blocks).T
        first = np.searchsorted(data.user, data.user[starts])  # of the block's user
        skipped = self._skipped(starts)
        lengths = data.seen[stops - 1] - skipped
        events = np.concatenate([np.arange(at, at + length) for at, length in zip(first + skipped, lengths)])
        sequences = {name: (values[events], lengths) for name, values in data.sequence.items()}
        sequences[CANDIDATE] = (data.sequence[ITEM][examples], per_block)
        return RankingBatch(
            torch.from_numpy(data.dense[examples]),
            _keyed({name: _take(lists, examples) for name, lists in data.sparse.items()}),
            _keyed(sequences),
            torch.from_numpy(data.seen[examples] - np.repeat(skipped, per_block)),
            torch.from_numpy(labels),
            torch.from_numpy(examples),
        )

    def _skipped(self, starts: np.ndarray) -> np.ndarray:
        """Give how many of the user's first events no example of a block looks at."""
        return np.maximum(self.dataset.seen[starts] - self.max_seq_len, 0)


def _blocks(chosen: np.ndarray, user: np.ndarray, size: int) -> Iterator[_Block]:
    """Cut the chosen events into runs that follow one another, of one user, of at most ``size``."""
    breaks = np.flatnonzero((np.diff(chosen) != 1) | (np.diff(user[chosen]) != 0)) + 1
    for run in np.split(chosen, breaks):
        for start in range(0, len(run), size):
            part = run[start : start + size]
            yield _Block(int(part[0]), int(part[-1]) + 1)


def _take(lists: Lists, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the values and lengths of some lists."""
    lengths = lists.offsets[rows + 1] - lists.offsets[rows]
    starts = np.repeat(lists.offsets[rows] - (np.cumsum(lengths) - lengths), lengths)
    return lists.values[starts + np.arange(len(starts))], lengths


def _keyed(features: dict[str, tuple[np.ndarray, np.ndarray]]) -> KeyedJaggedTensor:
    if not features:
        return KeyedJaggedTensor.empty(values_dtype=torch.int64)
    values = np.concatenate([values for values, _ in features.values()])
    lengths = np.concatenate([lengths for _, lengths in features.values()])
    return KeyedJaggedTensor(list(features), torch.from_numpy(values), lengths=torch.from_numpy(lengths))
