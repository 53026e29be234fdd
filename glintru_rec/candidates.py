"""The negatives that a sampled protocol ranks a target among: seeded, distinct, the same whatever the batch.

Shapes: B users, N negatives per user, S seen items of a batch, V catalog.
"""

import math

import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.jagged import sequence_index

# Rejection sampling doubles its draws this often before the few users it failed for pay for a pass over the catalog.
_ATTEMPTS = 3
_RACE_CELLS = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15


def sample_candidates(
    protocol_kind: str,
    num_candidates: int,
    user_index: Tensor,
    targets: Tensor,
    seen_values: Tensor,
    seen_offsets: Tensor,
    num_items: int,
    counts: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw each user's negatives, distinct and neither the target nor a seen item.

    Items are drawn one after the other without replacement, uniformly or in proportion to ``counts``. A user's
    negatives are a function of the seed, the user's index, target and seen items; never of the batch.

    A draw that may not be used is rejected, which costs O(N) per user as long as what a user may not get is a moderate
    share of what is drawn. For the others an exponential race over the catalog continues where the draws
    ended: both are successive sampling without replacement, so the distribution is the same, at O(V) for such a user.

    Args:
        protocol_kind: ``uniform`` or ``popularity``.
        num_candidates: N.
        user_index: what identifies a user in every batch and run, int64 ``[B]``.
        targets: int64 ``[B]``, from 0 to V - 1.
        seen_values: items to leave out, ragged, repeats allowed, int64 ``[S]``.
        seen_offsets: int64 ``[B + 1]``.
        num_items: V.
        counts: interactions of each item, int64 ``[V]``; for ``popularity``. An item without any is never drawn.
        seed: any integer.

    Returns:
        int64 ``[B, N]``, in the order they were drawn.

    Raises:
        InputError: fewer than N items remain for some user, or an argument is out of range.
    """
    counts = _checked_counts(protocol_kind, counts, num_items)
    if num_candidates < 1:
        raise InputError(f"num_candidates is {num_candidates}: at least 1 is needed")
    if num_candidates >= num_items:
        raise InputError(f"{num_candidates} candidates cannot be drawn beside the target from a catalog of {num_items} items")
    for name, ids in (("target", targets), ("seen item", seen_values)):
        outside = ids[(ids < 0) | (ids >= num_items)]
        if outside.numel():
            raise InputError(f"{name} {outside[0].item()} is outside of the catalog of {num_items} items")
    sampler = _Sampler(user_index, targets, seen_values, seen_offsets, num_items, counts, seed)
    chosen = targets.new_empty(targets.numel(), num_candidates)
    pending = torch.arange(targets.numel(), device=targets.device)
    num_draws = num_candidates + 8
    for _ in range(_ATTEMPTS):
        num_draws *= 2
        draws, usable = sampler.draw(pending, num_draws)
        order = usable.cumsum(1)
        enough = order[:, -1] >= num_candidates
        first = usable & (order <= num_candidates) & enough.unsqueeze(1)
        chosen[pending[enough]] = draws[first].view(-1, num_candidates)
        pending = pending[~enough]
    for rows in pending.split(max(1, _RACE_CELLS // num_items)) if pending.numel() else ():
        chosen[rows] = sampler.race(rows, num_draws, num_candidates)
    return chosen


class _Sampler:
    """Candidates of one batch; ``rows`` says for which of its users."""

    def __init__(
        self,
        user_index: Tensor,
        targets: Tensor,
        seen_values: Tensor,
        seen_offsets: Tensor,
        num_items: int,
        counts: Tensor | None,
        seed: int,
    ) -> None:
        self.user_index, self.num_items, self.counts, self.seed = user_index, num_items, counts, seed
        self.cumulative = None if counts is None else counts.cumsum(0)
        users = torch.arange(targets.numel(), device=targets.device)
        seen_by = sequence_index(seen_offsets, seen_values.numel())
        # One sorted list of (user, item) pairs, each as a number, answers every membership question of the batch.
        self.excluded = torch.cat([users * num_items + targets, seen_by * num_items + seen_values]).sort().values

    def is_excluded(self, rows: Tensor, items: Tensor) -> Tensor:
        """Whether ``items [b, M]`` are the target of, or seen by, the users ``rows [b]``."""
        pairs = rows.unsqueeze(1) * self.num_items + items
        found = torch.searchsorted(self.excluded, pairs).clamp(max=self.excluded.numel() - 1)
        return self.excluded[found] == pairs

    def draw(self, rows: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
        """Give the first draws with replacement ``[b, M]``, and which of them are allowed and not repeats."""
        bits = _random_bits(self.seed, 0, self.user_index[rows], num_draws)
        bits = bits & ((1 << 63) - 1)
        if self.cumulative is None:
            draws = bits % self.num_items
        else:
            draws = torch.searchsorted(self.cumulative, bits % self.cumulative[-1], right=True)
        ordered, order = draws.sort(dim=1, stable=True)
        repeats = torch.zeros_like(ordered, dtype=torch.bool)
        repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        repeats = torch.empty_like(repeats).scatter_(1, order, repeats)
        return draws, ~repeats & ~self.is_excluded(rows, draws)

    def race(self, rows: Tensor, num_draws: int, num_candidates: int) -> Tensor:
        """Keep the usable draws and go on without replacement: the next item is the next to arrive, at rate ``counts``."""
        bits = _random_bits(self.seed, 1, self.user_index[rows], self.num_items)
        arrivals = -((_shift_right(bits, 11) + 0.5) * 2.0**-53).log()
        if self.counts is not None:
            arrivals = arrivals / self.counts  # never, where the count is 0
        catalog = torch.arange(self.num_items, device=rows.device).expand(rows.numel(), -1)
        arrivals = arrivals.masked_fill(self.is_excluded(rows, catalog), math.inf)
        draws, usable = self.draw(rows, num_draws)
        user, order = usable.nonzero(as_tuple=True)
        arrivals[user, draws[user, order]] = (order - num_draws).to(arrivals.dtype)  # before the race began
        remaining = arrivals.isfinite().sum(1)
        if bool((remaining < num_candidates).any()):
            worst = int(remaining.argmin())
            raise InputError(
                f"user {self.user_index[rows[worst]].item()} has only {remaining[worst].item()} items left to draw "
                f"{num_candidates} candidates from: ask for fewer, rank the full catalog, or keep seen items"
            )
        return arrivals.topk(num_candidates, dim=1, largest=False, sorted=True).indices


def _random_bits(seed: int, stream: int, keys: Tensor, num: int) -> Tensor:
    """Hash ``(seed, stream, key, 0 .. num - 1)`` into int64 ``[B, num]``: SplitMix64, whose state is a counter."""
    start = _mix(torch.tensor([_signed(seed * 2 + stream)], device=keys.device) * _signed(_GOLDEN) + 1)
    counter = torch.arange(1, num + 1, device=keys.device) * _signed(_GOLDEN)
    return _mix(_mix(start + keys).unsqueeze(1) + counter)


def _mix(state: Tensor) -> Tensor:
    """Finalise SplitMix64; int64 products wrap, which is what it asks for."""
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shift in zeros; torch shifts in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """Read the low 64 bits as int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _checked_counts(protocol_kind: str, counts: Tensor | None, num_items: int) -> Tensor | None:
    if protocol_kind == "uniform":
        return None
    if protocol_kind != "popularity":
        raise InputError(f"candidates of kind {protocol_kind!r} are not sampled: choose uniform or popularity")
    if counts is None or counts.shape != (num_items,) or counts.dtype != torch.int64:
        raise InputError(f"popularity candidates need counts, int64 [{num_items}], one for each item")
    if bool((counts < 0).any()) or not bool((counts > 0).any()):
        raise InputError("counts of popularity candidates must not be negative, and not all of them 0")
    return counts
