"""Ranking metrics, and the protocol they were measured under.

Every evaluation is leave one out: one target per user, so a metric is a mean over users of a function of the
target's rank. A figure means nothing without its `Protocol`, which is printed and stored beside it.

Shapes: B users.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glintru_rec.errors import InputError

TIE_POLICY = "half"
UNRANKED = math.inf
DEFAULT_KS = (1, 5, 10, 20, 50, 100)

_TARGETS = {"valid": "last but one item", "test": "last item"}


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


def _checked_ks(ks: Iterable[int]) -> tuple[int, ...]:
    checked = tuple(ks)
    for k in checked:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < 2**31:
            raise InputError(f"ks holds {k!r}: a cut-off is an integer of at least 1")
    if not checked or len(set(checked)) < len(checked):
        raise InputError(f"ks is {list(checked)}: give at least one cut-off, each once")
    return checked
