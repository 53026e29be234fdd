"""What each rank does on its own in a step, so that a slow one, or one that serves most of the table, can be seen.

In every step all ranks wait for the slowest, so their steps take equally long. What differs is the time from when a rank has
its table rows to when it has their gradients: encoder and loss, forwards and backwards, with no exchange between ranks in it
(but with ``loss.gather_negatives``, which is over before, and gradients, which are sent on the way and waited for after). The
rest is exchange: from when a rank asks the table for rows until it has them, and from when it has the rows' gradients until the
backward pass ends; the all-to-alls both ways, looking up, updating, and waiting for slower ranks.
"""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A rank lags if the median of the others is this many times as fast.
LAG = 1.5
MIN_SECONDS = 1.0


class RankMeter:
    """Measure this rank between two calls of `collect`.

    Args:
        table: the item table of the model that is trained.
        rows_per_rank: of a table spread by rows: rank r has those from ``r * rows_per_rank`` on; 0 for one that is not.
    """

    def __init__(self, table: nn.Module, rows_per_rank: int):
        self.rows_per_rank, self.world_size = rows_per_rank, dist.get_world_size()
        self.spans: list[tuple[Any, Any]] = []  # of encoder and loss: beginnings and ends, seconds or CUDA events
        self.exchanges: list[tuple[Any, Any]] = []
        self.lookups = torch.zeros(self.world_size, dtype=torch.int64)
        table.register_forward_pre_hook(self._asked)
        table.register_forward_hook(self._looked_up)

    def collect(self, num_targets: float) -> dict[str, list[float]]:
        """Bring the figures of all ranks together, since the last call; all ranks call it.

        Args:
            num_targets: that this rank has trained on.

        Returns:
            By rank: ``rank_seconds`` in encoder and loss, ``rank_targets_per_second`` over these,
            ``rank_exchange_seconds``, and of a table spread by rows ``rank_lookups``, rows that it was asked for by all.
        """
        spent, exchanging = (sum(_seconds(*span) for span in spans) for spans in (self.spans, self.exchanges))
        own = torch.tensor([spent, num_targets, exchanging], dtype=torch.float64)
        self.spans, self.exchanges = [], []
        ranks = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(ranks, own)
        seconds, targets, exchanges = torch.stack(ranks).T.tolist()
        rates = [count / spent if spent else 0.0 for count, spent in zip(targets, seconds)]
        figures = {"rank_seconds": seconds, "rank_targets_per_second": rates, "rank_exchange_seconds": exchanges}
        if self.rows_per_rank:
            lookups, self.lookups = self.lookups.cpu(), torch.zeros_like(self.lookups)
            dist.all_reduce(lookups)
            figures["rank_lookups"] = lookups.tolist()
        return figures

    def backward_ended(self, loss: Tensor) -> None:
        """Take in that the backward pass of a ``loss`` is over."""
        self.exchanges.append((self.spans[-1][1], _now(loss)))

    def _asked(self, _: nn.Module, ids: tuple[Tensor, ...]) -> None:
        self.asked = _now(ids[0])

    def _looked_up(self, _: nn.Module, ids: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # a validation
            return
        if self.rows_per_rank:
            owners = torch.cat(ids) // self.rows_per_rank
            self.lookups = self.lookups.to(owners.device).index_add_(0, owners, torch.ones_like(owners))
        begin, place = _now(rows[0]), len(self.spans)
        self.exchanges.append((self.asked, begin))
        self.spans.append((begin, begin))

        def has_gradient(gradient: Tensor) -> None:
            self.spans[place] = (begin, _now(gradient))

        for each in rows:
            each.register_hook(has_gradient)


def describe_lag(seconds: list[float], rates: list[float]) -> str:
    """Name the slowest rank, if the median of the others is `LAG` times as fast or more; empty if none lags.

    Args:
        seconds: ``rank_seconds`` of `RankMeter.collect`; where none has `MIN_SECONDS`, chance decides who is slow.
        rates: and ``rank_targets_per_second``.
    """
    slowest = min(range(len(rates)), key=rates.__getitem__)
    others = [rate for rank, rate in enumerate(rates) if rank != slowest]
    if max(seconds) < MIN_SECONDS or not others or not statistics.median(others) >= LAG * rates[slowest] > 0:
        return ""
    return (
        f"rank {slowest} lags: {rates[slowest]:,.0f} targets/s in encoder and loss, the others {statistics.median(others):,.0f}"
    )


def _now(tensor: Tensor) -> Any:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
