"""A catalog that the ranks of a job share: each searches its own part for the users of all.

::

    rank 0  reads and encodes its batch ──┐ all ranks have       ┌─ own part: best of 0, 1 ──┐ rank 0 gets   ┌─▶ best of all
    rank 1  reads and encodes its batch ──┘ both batches' queries └─ own part: best of 0, 1 ──┘ those of its  └─▶ best of all

Shapes: B users of a batch, T items to leave out, Q numbers of a query.
"""

from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from glintru_rec.scoring.pipeline import map_in_order
from glintru_rec.scoring.ranks import rank_and_size


class _Request(NamedTuple):
    query: Tensor
    """float32 ``[B, Q]``."""
    seen_ids: Tensor
    """int64 ``[T]``."""
    seen_lengths: Tensor
    """int64 ``[B]``."""
    k: int
    is_last: bool = False
    """Nothing is asked, now or later."""


class SplitCatalog:
    """Find the best items of a catalog of which every rank holds a part.

    A search is a round that all ranks take part in, each with one batch of its own. A rank that has none left calls `serve`,
    so that the others can go on. Results are those of one search of the whole, to the bit.

    Args:
        stretches: this rank's part, in the order of the catalog; see `stretches_of`.
        num_threads: that search them.
    """

    def __init__(self, stretches: list[Any], num_threads: int):
        self._stretches = stretches
        self._num_threads = num_threads
        self._rank, self._size = rank_and_size()
        self._lock = Lock()

    def top_k_of(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do what `ScoringModule.top_k_of` does; threads take turns."""
        with self._lock:
            best = self._round(_Request(query.contiguous(), seen_ids, seen_lengths, k))
        assert best is not None
        return best

    def serve(self) -> None:
        """Search for the other ranks until they have no batch left, either; nothing to do for a job of one rank."""
        nothing = torch.zeros(0, dtype=torch.int64)
        while self._size > 1 and self._round(_Request(torch.zeros(0, 0), nothing, nothing, 0, is_last=True)) is not None:
            pass

    def _round(self, own: _Request) -> tuple[Tensor, Tensor] | None:
        """Answer one batch of each rank; give the answer to one's own, or None where no rank asks any more."""
        requests = self._exchanged(own)
        if all(request.is_last for request in requests):
            return None

        def search(task: tuple[_Request, Any]) -> tuple[Tensor, Tensor]:
            request, stretch = task
            with torch.inference_mode():
                return stretch.top_k_of(request.query, request.seen_ids, request.seen_lengths, request.k)

        tasks = [(request, stretch) for request in requests for stretch in self._stretches if not request.is_last]
        found = map_in_order(search, iter(tasks), self._num_threads)
        answer = (torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))
        for rank, request in enumerate(requests):
            if not request.is_last:
                here = [next(found) for _ in self._stretches]
                collected = self._collected(_best_of(here, len(request.query), request.k), rank)
                if rank == self._rank:
                    answer = _best_of(collected, len(request.query), request.k)
        return answer

    def _exchanged(self, own: _Request) -> list[_Request]:
        """Give the requests of all ranks."""
        if self._size == 1:
            return [own]
        sizes = torch.tensor([*own.query.shape, len(own.seen_ids), own.k, own.is_last])
        all_sizes = [torch.empty_like(sizes) for _ in range(self._size)]
        dist.all_gather(all_sizes, sizes)
        requests = []
        for rank, numbers in enumerate(all_sizes):
            num_users, width, num_seen, k, is_last = numbers.tolist()
            request = own
            if rank != self._rank:
                ids, lengths = (torch.empty(size, dtype=torch.int64) for size in (num_seen, num_users))
                request = _Request(torch.empty(num_users, width), ids, lengths, k, bool(is_last))
            if not is_last:
                for tensor in (request.query, request.seen_ids, request.seen_lengths):
                    dist.broadcast(tensor, rank)
            requests.append(request)
        return requests

    def _collected(self, best: tuple[Tensor, Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
        """Give one rank what all of them found for it, in the order of the catalog; the others get nothing."""
        if self._size == 1:
            return [best]
        lists = []
        for tensor in best:
            everyones = [torch.empty_like(tensor) for _ in range(self._size)] if rank == self._rank else []
            dist.gather(tensor, everyones or None, rank)
            lists.append(everyones)
        return list(zip(*lists))


def _best_of(found: list[tuple[Tensor, Tensor]], num_users: int, k: int) -> tuple[Tensor, Tensor]:
    """Merge what was found in several parts of the catalog, given in its order: of equal scores the lower id comes first."""
    ids = torch.cat([torch.full([num_users, k], -1), *(part for part, _ in found)], dim=1)
    scores = torch.cat([torch.full([num_users, k], float("-inf")), *(part for _, part in found)], dim=1)
    order = torch.sort(scores, dim=1, descending=True, stable=True)[1][:, :k]
    return ids.gather(1, order), scores.gather(1, order)
