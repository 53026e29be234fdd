import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glintru_rec import metrics
from glintru_rec.errors import InputError
from glintru_rec.metrics import UNRANKED, Protocol, RankingMetrics, ranking_metrics, sample_candidates, target_ranks

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


# --- sampled candidates ---


def ragged(histories):
    offsets = torch.tensor([0, *itertools.accumulate(map(len, histories))])
    return torch.tensor([item for history in histories for item in history], dtype=torch.int64), offsets


def same_for_everyone(num_users, target, seen):
    values, offsets = ragged([seen] * num_users)
    return torch.arange(num_users), torch.full((num_users,), target), values, offsets


def assert_frequencies(observed, probabilities):
    """Bound the chi-square statistic at five standard deviations above its mean."""
    assert set(observed) <= set(probabilities)
    assert sum(probabilities.values()) == pytest.approx(1)
    total = sum(observed.values())
    statistic = sum((observed.get(cell, 0) - total * p) ** 2 / (total * p) for cell, p in probabilities.items())
    freedom = len(probabilities) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def tally(rows):
    observed = {}
    for row in map(tuple, rows.tolist()):
        observed[row] = observed.get(row, 0) + 1
    return observed


def sequences_without_replacement(weights, length):
    """Probability of every ordered draw of ``length`` items, one after the other in proportion to ``weights``."""
    result = {}
    for items in itertools.permutations([item for item, weight in enumerate(weights) if weight], length):
        probability, left = 1.0, sum(weights)
        for item in items:
            probability *= weights[item] / left
            left -= weights[item]
        result[items] = probability
    return result


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
@pytest.mark.parametrize("num_candidates", [1, 10, 60])
def test_candidates_are_distinct_and_new_to_the_user(kind, num_candidates):
    generator = torch.Generator().manual_seed(0)
    histories = [torch.randint(100, (n,), generator=generator).tolist() for n in [0, 1, 30, 35] * 10]
    values, offsets = ragged(histories)
    targets = torch.randint(100, (40,), generator=generator)
    counts = torch.randint(1, 1000, (100,), generator=generator)
    chosen = sample_candidates(kind, num_candidates, torch.arange(40), targets, values, offsets, 100, counts, seed=1)
    assert chosen.shape == (40, num_candidates)
    assert chosen.dtype == torch.int64
    for row, history, target in zip(chosen.tolist(), histories, targets.tolist()):
        assert len(set(row)) == num_candidates
        assert not set(row) & {target, *history}
        assert set(row) <= set(range(100))


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_candidates_do_not_depend_on_the_batch(kind):
    num_items, num_users = 40, 30
    generator = torch.Generator().manual_seed(0)
    # Histories of every length, so that some users are served by draws and some by the race.
    histories = [torch.randperm(num_items, generator=generator)[:n].tolist() for n in range(num_users)]
    targets = torch.randint(num_items, (num_users,), generator=generator)
    counts = torch.randint(1, 10_000, (num_items,), generator=generator)

    def sample(users, seed=5):
        values, offsets = ragged([histories[user] for user in users])
        index = torch.tensor(users)
        return sample_candidates(kind, 9, index, targets[index], values, offsets, num_items, counts, seed)

    everyone = sample(range(num_users))
    shuffled = torch.randperm(num_users, generator=generator).tolist()
    assert torch.equal(sample(shuffled), everyone[shuffled])
    for user in range(num_users):
        assert torch.equal(sample([user])[0], everyone[user])
    assert not torch.equal(sample(range(num_users), seed=6), everyone)


def test_users_draw_independently():
    """What one user draws says nothing of what the next one draws."""
    arguments = same_for_everyone(20_001, target=5, seen=[])
    first = sample_candidates("uniform", 1, *arguments, num_items=6, seed=-3).squeeze(1)
    pairs = torch.stack([first[:-1], first[1:]], dim=1)
    assert_frequencies(tally(pairs), dict.fromkeys(itertools.product(range(5), repeat=2), 1 / 25))


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_uniform_frequencies(num_candidates):
    arguments = same_for_everyone(20_000, target=7, seen=[0, 3, 3])
    chosen = sample_candidates("uniform", num_candidates, *arguments, num_items=8)
    assert_frequencies(tally(chosen), sequences_without_replacement([0, 1, 1, 0, 1, 1, 1, 0], num_candidates))


@pytest.mark.parametrize(
    ("heavy", "served_by_race"),
    [(10, (0.0, 0.001)), (700, (0.1, 0.9)), (1_000_000, (0.99, 1.0))],
)
def test_popularity_frequencies_whoever_serves(heavy, served_by_race, monkeypatch):
    """Draws, race, or a user that goes from one to the other: the distribution is that of drawing without replacement."""
    num_users, raced = 20_000, []
    race = metrics._Sampler.race

    def spy(self, rows, *arguments):
        raced.append(rows.numel())
        return race(self, rows, *arguments)

    monkeypatch.setattr(metrics._Sampler, "race", spy)
    monkeypatch.setattr(metrics, "_RACE_CELLS", 10_000)
    counts = torch.tensor([heavy, 9, 5, 3, 0, 50])
    arguments = same_for_everyone(num_users, target=5, seen=[4])
    chosen = sample_candidates("popularity", 3, *arguments, num_items=6, counts=counts)
    least, most = served_by_race
    assert least <= sum(raced) / num_users <= most
    probabilities = sequences_without_replacement([heavy, 9, 5, 3], 3)
    common = {items: p for items, p in probabilities.items() if p * num_users >= 5}
    observed = {items: n for items, n in tally(chosen).items() if items in common}
    assert sum(observed.values()) >= num_users * sum(common.values()) - 50
    assert_frequencies(observed, {items: p / sum(common.values()) for items, p in common.items()})


def test_everything_that_remains_can_be_asked_for():
    arguments = same_for_everyone(4, target=0, seen=[1, 2])
    chosen = sample_candidates("uniform", 7, *arguments, num_items=10)
    assert chosen.sort(dim=1).values.tolist() == [list(range(3, 10))] * 4


def test_an_empty_batch_gives_no_candidates():
    assert sample_candidates("uniform", 3, *same_for_everyone(0, 0, []), num_items=10).shape == (0, 3)


def test_too_few_items_left_names_the_user():
    values, offsets = ragged([[1], [1, 2, 3]])
    users, targets = torch.tensor([70, 71]), torch.tensor([0, 0])
    with pytest.raises(InputError, match="user 71 has only 2 items left to draw 3"):
        sample_candidates("uniform", 3, users, targets, values, offsets, 6)
    counts = torch.tensor([5, 5, 5, 5, 1, 0])
    with pytest.raises(InputError, match="user 71 has only 1 items left to draw 3"):
        sample_candidates("popularity", 3, users, targets, values, offsets, 6, counts)
    with pytest.raises(InputError, match="has only"):
        sample_candidates("uniform", 50, users, targets, values, offsets, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol_kind": "full"}, "'full' are not sampled"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"targets": torch.tensor([9])}, "target 9 is outside"),
        ({"seen_values": torch.tensor([-1])}, "seen item -1 is outside"),
        ({"counts": None}, "need counts"),
        ({"counts": torch.ones(5)}, "need counts"),
        ({"counts": torch.tensor([1, 1, 1, 1, -1])}, "negative"),
        ({"counts": torch.zeros(5, dtype=torch.int64)}, "all of them 0"),
    ],
)
def test_bad_sampling_arguments_are_refused(changes, message):
    arguments = {
        "protocol_kind": "popularity",
        "num_candidates": 1,
        "user_index": torch.tensor([0]),
        "targets": torch.tensor([0]),
        "seen_values": torch.tensor([1]),
        "seen_offsets": torch.tensor([0, 1]),
        "num_items": 5,
        "counts": torch.ones(5, dtype=torch.int64),
    }
    with pytest.raises(InputError, match=message):
        sample_candidates(**arguments | changes)


def test_no_user_gets_no_candidates():
    none = torch.empty(0, dtype=torch.int64)
    assert sample_candidates("uniform", 5, none, none, none, torch.zeros(1, dtype=torch.int64), 9).shape == (0, 5)
