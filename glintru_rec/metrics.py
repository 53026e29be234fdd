"""Ranking metrics, the protocol they were measured under, and the candidates that a sampled protocol ranks.

Every evaluation is leave one out: one target per user, so a metric is a mean over users of a function of the
target's rank. A figure means nothing without its `Protocol`, which is printed and stored beside it.

Shapes: B users, N negative candidates per user, S seen items of a batch, V catalog.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.jagged import sequence_index

TIE_POLICY = "half"
UNRANKED = math.inf
DEFAULT_KS = (1, 5, 10, 20, 50, 100)

_TARGETS = {"valid": "last but one item", "test": "last item"}

# Rejection sampling doubles its draws this often before the few users it failed for pay for a pass over the catalog.
_ATTEMPTS = 3
_RACE_CELLS = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15


def target_ranks(num_above: Tensor, num_tied: Tensor) -> Tensor:
    """Count the places above each target, an item tied with it as half a place.

    This is the mean rank over all orders of the tied items. A collapsed model, which gives all V candidates the same
    score, gets the rank ``(V - 1) / 2`` that a random order has on average. Ties resolved for the target would make
    that model perfect, and by item index would make it as good as the indices are informative.

    Args:
        num_above: candidates that score higher than the target, ``[B]``.
        num_tied: candidates that score the same, the target itself not counted, ``[B]``.

    Returns:
        Ranks from 0 (best), float64 ``[B]``. Put `UNRANKED` where the target was not among the candidates.
    """
    return num_above.to(torch.float64) + num_tied.to(torch.float64) / 2


class RankingMetrics:
    """Sums of hr, ndcg and mrr over targets; adding two states is the same as seeing both sets of ranks.

    Args:
        ks: cut-offs.
        device: where the sums live; the device of the process group if they are to be all-reduced.
    """

    def __init__(self, ks: Iterable[int] = DEFAULT_KS, device: torch.device | str = "cpu") -> None:
        self.ks = _checked_ks(ks)
        self._sums = torch.zeros(2 + 3 * len(self.ks), dtype=torch.float64, device=device)

    def update(self, ranks: Tensor) -> None:
        """Add targets.

        Args:
            ranks: 0-based, halves allowed, `UNRANKED` for a target that cannot be ranked: a miss everywhere. ``[B]``

        Raises:
            ValueError: a rank is NaN or negative.
        """
        ranks = ranks.to(self._sums)
        if not bool((ranks >= 0).all()):  # false for NaN too
            raise ValueError(f"a rank must be at least 0, got {ranks[~(ranks >= 0)][0].item()}")
        within = ranks.unsqueeze(1) < torch.tensor(self.ks, device=ranks.device)
        gain = within / (ranks + 2).log2().unsqueeze(1)
        reciprocal = 1 / (ranks + 1)
        self._sums += torch.cat(
            [
                ranks.new_tensor([ranks.numel()]),
                reciprocal.sum().unsqueeze(0),
                within.to(ranks.dtype).sum(0),
                gain.sum(0),
                (within * reciprocal.unsqueeze(1)).sum(0),
            ]
        )

    def state(self) -> Tensor:
        """Copy the sums out, a float64 vector; states of several processes may be added (``all_reduce``)."""
        return self._sums.clone()

    def load_state(self, state: Tensor) -> None:
        """Replace the sums by ``state``, of the same ``ks``."""
        if state.shape != self._sums.shape:
            raise ValueError(f"a state for ks {self.ks} has shape {tuple(self._sums.shape)}, got {tuple(state.shape)}")
        self._sums = state.to(self._sums, copy=True)

    def compute(self) -> dict[str, float]:
        """Divide the sums by the number of targets.

        Returns:
            ``hr@k``, ``recall@k``, ``ndcg@k``, ``mrr@k`` for every k, and ``mrr`` over all ranks. With one target per
            user a hit finds everything there is to find, so recall equals the hit rate; it is given under both names
            because published tables use either.

        Raises:
            ValueError: there was no target.
        """
        num_targets, *sums = self._sums.tolist()
        if num_targets == 0:
            raise ValueError("no target was ranked")
        mrr, *at_k = [value / num_targets for value in sums]
        num_ks = len(self.ks)
        result: dict[str, float] = {}
        for i, k in enumerate(self.ks):
            hit_rate, ndcg, mrr_at_k = at_k[i::num_ks]
            result |= {f"hr@{k}": hit_rate, f"recall@{k}": hit_rate, f"ndcg@{k}": ndcg, f"mrr@{k}": mrr_at_k}
        return result | {"mrr": mrr}


def ranking_metrics(ranks: Tensor, ks: Iterable[int] = DEFAULT_KS) -> dict[str, float]:
    """Compute the metrics of one set of 0-based ranks ``[B]``; see `RankingMetrics`.

    >>> ranking_metrics(torch.tensor([0.0, 2.0]), ks=[1])["hr@1"]
    0.5
    """
    metrics = RankingMetrics(ks, ranks.device)
    metrics.update(ranks)
    return metrics.compute()


@dataclass(frozen=True)
class Protocol:
    """How targets are chosen and what they are ranked against.

    Attributes:
        candidates: ``full`` ranks the whole catalog; ``uniform:N`` and ``popularity:N`` rank the target among N sampled
            negatives. Sampled figures are higher, and may order models differently.
        exclude_seen: leave out the items of the user's history. A target that is one of them counts as a miss.
        ks: cut-offs of the metrics.
        seed: of the sampled candidates.
        split: ``test`` takes each user's last item as target, ``valid`` the last but one.

    Raises:
        InputError: a value is none of these.
    """

    candidates: str = "full"
    exclude_seen: bool = True
    ks: tuple[int, ...] = DEFAULT_KS
    seed: int = 0
    split: str = "test"

    def __post_init__(self) -> None:
        self.parse(self.candidates)
        object.__setattr__(self, "ks", _checked_ks(self.ks))  # a config file gives a list
        if not isinstance(self.exclude_seen, bool):
            raise InputError(f"exclude_seen is {self.exclude_seen!r}: write true or false")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed is {self.seed!r}: write an integer")
        if self.split not in _TARGETS:
            raise InputError(f"split is {self.split!r}: choose one of {', '.join(_TARGETS)}")

    @staticmethod
    def parse(candidates: str) -> tuple[str, int | None]:
        """Split ``uniform:100`` into ``("uniform", 100)``, and ``full`` into ``("full", None)``.

        Raises:
            InputError: it is neither ``full`` nor ``uniform:N`` nor ``popularity:N`` with N at least 1.
        """
        kind, _, number = candidates.partition(":")
        if candidates == "full":
            return "full", None
        if kind in ("uniform", "popularity") and number.isascii() and number.isdigit() and int(number) > 0:
            return kind, int(number)
        raise InputError(f"candidates is {candidates!r}: write full, uniform:N or popularity:N, for example uniform:100")

    @property
    def kind(self) -> str:
        """``full``, ``uniform`` or ``popularity``."""
        return self.parse(self.candidates)[0]

    @property
    def num_candidates(self) -> int | None:
        """Negatives per user; None when the whole catalog is ranked."""
        return self.parse(self.candidates)[1]

    def describe(self) -> dict[str, object]:
        """Say everything that a figure depends on, as values that JSON has. The keys are always the same."""
        return {
            "split": self.split,
            "target": f"leave one out, {_TARGETS[self.split]}",
            "candidates": self.candidates,
            "exclude_seen": self.exclude_seen,
            "tie_policy": TIE_POLICY,
            "seed": None if self.kind == "full" else self.seed,
            "ks": list(self.ks),
        }

    def __str__(self) -> str:
        against = "the whole catalog"
        if self.kind != "full":
            against = f"{self.num_candidates} {self.kind} negatives (seed {self.seed})"
        seen = "left out" if self.exclude_seen else "kept"
        return (
            f"{self.split}: leave one out, {_TARGETS[self.split]}, ranked against {against}; "
            f"seen items {seen}; a tie counts {TIE_POLICY} a place"
        )


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
    for name, ids in (("target", targets), ("seen item", seen_values)):
        outside = ids[(ids < 0) | (ids >= num_items)]
        if outside.numel():
            raise InputError(f"{name} {outside[0].item()} is outside of the catalog of {num_items} items")
    if targets.numel() == 0:
        return targets.new_empty(0, num_candidates)
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
    for rows in pending.split(max(1, _RACE_CELLS // num_items)):
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


def _checked_ks(ks: Iterable[int]) -> tuple[int, ...]:
    checked = tuple(ks)
    for k in checked:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"ks holds {k!r}: a cut-off is an integer of at least 1")
    if not checked or len(set(checked)) < len(checked):
        raise InputError(f"ks is {list(checked)}: give at least one cut-off, each once")
    return checked


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
