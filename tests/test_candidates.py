import itertools
import math

import pytest
import torch

from glintru_rec import candidates
from glintru_rec.candidates import sample_candidates
from glintru_rec.errors import InputError


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
    race = candidates._Sampler.race

    def spy(self, rows, *arguments):
        raced.append(rows.numel())
        return race(self, rows, *arguments)

    monkeypatch.setattr(candidates._Sampler, "race", spy)
    monkeypatch.setattr(candidates, "_RACE_CELLS", 10_000)
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
    with pytest.raises(InputError, match="50 candidates cannot be drawn beside the target from a catalog of 6 items"):
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
