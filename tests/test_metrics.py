import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glintru_rec.errors import InputError
from glintru_rec.metrics import UNRANKED, Protocol, RankingMetrics, ranking_metrics, target_ranks

KS = (1, 2, 5, 10)
ranks_strategy = st.lists(st.integers(0, 60).map(lambda half: half / 2) | st.just(UNRANKED), min_size=1, max_size=30)


def as_ranks(ranks):
    return torch.tensor(ranks, dtype=torch.float64)


# --- ranks ---


def test_a_tie_is_half_a_place():
    ranks = target_ranks(torch.tensor([0, 3, 0, 2]), torch.tensor([0, 0, 1, 4]))
    assert ranks.dtype == torch.float64
    assert ranks.tolist() == [0.0, 3.0, 0.5, 4.0]


@pytest.mark.parametrize("num_items", [1, 2, 7])
def test_a_collapsed_model_ranks_like_a_random_order(num_items):
    mean_rank_of_random_order = Fraction(sum(range(num_items)), num_items)
    rank = target_ranks(torch.tensor([0]), torch.tensor([num_items - 1]))
    assert Fraction(rank.item()) == mean_rank_of_random_order


# --- metrics ---


def test_metrics_by_hand():
    result = ranking_metrics(as_ranks([0, 3, 0.5, UNRANKED, 9]), ks=(1, 2, 5))
    by_hand = {
        "hr@1": Fraction(2, 5),  # rank 0.5 is within the first place, rank 1 would not be
        "hr@2": Fraction(2, 5),
        "hr@5": Fraction(3, 5),
        "mrr@1": (1 + Fraction(2, 3)) / 5,
        "mrr@2": (1 + Fraction(2, 3)) / 5,
        "mrr@5": (1 + Fraction(2, 3) + Fraction(1, 4)) / 5,
        "mrr": (1 + Fraction(2, 3) + Fraction(1, 4) + Fraction(1, 10)) / 5,
    }
    by_hand |= {name.replace("hr", "recall"): value for name, value in by_hand.items() if name.startswith("hr")}
    by_hand |= {f"ndcg@{k}": (1 + 1 / math.log2(2.5)) / 5 for k in (1, 2)}
    by_hand["ndcg@5"] = (1 + 1 / math.log2(2.5) + 1 / math.log2(5)) / 5
    assert result == pytest.approx({name: float(value) for name, value in by_hand.items()}, rel=1e-15)


def test_rank_k_is_the_first_miss():
    assert [ranking_metrics(as_ranks([rank]), ks=[5])["hr@5"] for rank in (4, 4.5, 5, 6)] == [1, 1, 0, 0]


def test_a_missing_target_is_a_miss_everywhere_and_is_counted():
    assert set(ranking_metrics(as_ranks([UNRANKED])).values()) == {0.0}
    assert ranking_metrics(as_ranks([0, UNRANKED]))["mrr"] == 0.5


def test_integer_and_float32_ranks_are_taken():
    for dtype in (torch.int64, torch.float32):
        assert ranking_metrics(torch.tensor([0, 2], dtype=dtype), ks=[3])["ndcg@3"] == 0.75


def test_nothing_ranked_is_an_error():
    with pytest.raises(ValueError, match="no target was ranked"):
        ranking_metrics(as_ranks([]))


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_an_impossible_rank_is_an_error(bad):
    with pytest.raises(ValueError, match=f"got {bad}"):
        ranking_metrics(as_ranks([0, bad]))


@pytest.mark.parametrize("ks", [(), (0,), (1, 1), (1.5,), (True,)])
def test_bad_cut_offs_are_refused(ks):
    with pytest.raises(InputError, match="ks"):
        RankingMetrics(ks)


@given(ranks_strategy)
def test_laws_between_metrics(ranks):
    result = ranking_metrics(as_ranks(ranks), KS)
    tolerance = 1e-12
    for name in ("hr", "ndcg", "mrr"):
        values = [result[f"{name}@{k}"] for k in KS]
        assert values == sorted(values)
        assert all(0 <= value <= 1 for value in values)
    for k in KS:
        assert result[f"mrr@{k}"] <= result[f"ndcg@{k}"] + tolerance
        assert result[f"ndcg@{k}"] <= result[f"hr@{k}"] + tolerance
        assert result[f"recall@{k}"] == result[f"hr@{k}"]
        assert result[f"mrr@{k}"] <= result["mrr"] + tolerance


@given(ranks_strategy, st.randoms())
def test_order_does_not_matter(ranks, random):
    shuffled = random.sample(ranks, len(ranks))
    assert ranking_metrics(as_ranks(shuffled), KS) == pytest.approx(ranking_metrics(as_ranks(ranks), KS), rel=1e-12)


@given(ranks_strategy, st.integers(0, 30))
def test_two_accumulators_equal_one(ranks, cut):
    parts = RankingMetrics(KS), RankingMetrics(KS)
    for part, share in zip(parts, (ranks[:cut], ranks[cut:])):
        part.update(as_ranks(share))
    both = RankingMetrics(KS)
    both.load_state(parts[0].state() + parts[1].state())
    assert both.state().dtype == torch.float64
    assert both.compute() == pytest.approx(ranking_metrics(as_ranks(ranks), KS), rel=1e-12)


def test_state_is_a_copy_and_fits_its_ks():
    accumulator = RankingMetrics(KS)
    accumulator.update(as_ranks([0, 4]))
    saved = accumulator.state()
    saved.zero_()
    assert accumulator.compute()["hr@5"] == 1
    with pytest.raises(ValueError, match="shape"):
        RankingMetrics([1]).load_state(saved)


# --- protocol ---


def test_protocol_describes_itself():
    protocol = Protocol("uniform:100", exclude_seen=False, ks=[1, 10], seed=3, split="valid")
    assert (protocol.kind, protocol.num_candidates, protocol.ks) == ("uniform", 100, (1, 10))
    assert json.loads(json.dumps(protocol.describe())) == {
        "split": "valid",
        "target": "leave one out, last but one item",
        "candidates": "uniform:100",
        "exclude_seen": False,
        "tie_policy": "half",
        "seed": 3,
        "ks": [1, 10],
    }
    line = str(protocol)
    assert "\n" not in line
    for part in ("valid", "last but one item", "100 uniform negatives", "seed 3", "kept", "half"):
        assert part in line


def test_full_protocol_does_not_depend_on_a_seed():
    assert Protocol(seed=1).describe() == Protocol(seed=2).describe()
    assert str(Protocol(seed=1)) == str(Protocol(seed=2))
    assert Protocol().describe().keys() == Protocol("popularity:5").describe().keys()


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"candidates": text}
            for text in ("", "all", "full:10", "uniform", "uniform:", "uniform:0", "uniform:-1", "popularity:x")
        ),
        {"split": "train"},
        {"exclude_seen": "false"},
        {"seed": 1.5},
        {"ks": (0,)},
    ],
)
def test_protocol_names_the_bad_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(InputError) as error:
        Protocol(**settings)
    assert name in str(error.value)
    assert repr(value).strip("(),") in str(error.value)
