"""Losses in which what a user has seen weighs less, or nothing, against the formula; on ranks: test_sharded_softmax."""

import math

import pytest
import torch
from torch.testing import assert_close

from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import full_softmax, sampled_softmax, seen_before, softmax

NUM_ITEMS = 19
LENGTHS = [5, 2, 9, 0, 12]
CAUSAL = "every position"
PLACES = {
    CAUSAL: torch.tensor([1, 2, 3, 4, 6, *range(8, 16), *range(17, 28)]),
    "last of each": torch.tensor([4, 6, 15, 27]),
    "no target": torch.empty(0, dtype=torch.int64),
}


def problem(places, horizon, weight):
    """Sequences in which items come again; for each target the log weight of every item; vectors.

    Less weight has what stands before a target, but for what its position aims at.
    """
    generator = torch.Generator().manual_seed(0)
    offsets = offsets_from_lengths(torch.tensor(LENGTHS))
    item_ids = torch.randint(NUM_ITEMS, (28,), generator=generator)
    log_weights = torch.zeros(len(places), NUM_ITEMS, dtype=torch.float64)
    for t, place in enumerate(places.tolist()):
        sequence = int((offsets <= place).sum()) - 1
        begin, end = offsets[sequence : sequence + 2].tolist()
        seen = set(item_ids[begin:place].tolist()) - set(item_ids[place : min(place + horizon, end)].tolist())
        log_weights[t, sorted(seen)] = math.log(weight) if weight else -math.inf
    vectors = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (len(places), len(places), NUM_ITEMS)]
    return seen_before(item_ids, offsets, places, horizon, weight), item_ids[places], log_weights, vectors


def check(ours, expected, leaves):
    assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if not ours.numel():
        return
    weight = torch.linspace(0.5, 1, ours.numel(), dtype=torch.float64)
    for weights in (weight, torch.ones_like(weight)):  # unequal, and equal: those are gradients taken at once
        ours_grads, grads = (torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (ours, expected))
        assert_close(ours_grads, grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("horizon", "weight"), [(1, 0.0), (3, 0.0), (3, 0.2)])
@pytest.mark.parametrize("at_once", [True, False])
def test_exact(places, horizon, weight, at_once, monkeypatch):
    for name, size in (("ROWS", 4), ("COLUMNS", 8), ("ROWS_AT_ONCE", 3), ("COLUMNS_AT_ONCE", 50 if at_once else 5)):
        monkeypatch.setattr(softmax, name, size)
    seen, _, log_weights, vectors = problem(PLACES[places], horizon, weight)
    query, aim, items = leaves = [x.requires_grad_() for x in vectors]
    assert places != CAUSAL or int((log_weights < 0).sum()) > 50
    expected = (query @ items.t() / 0.7 + log_weights).logsumexp(1) - (query * aim).sum(1) / 0.7
    check(full_softmax(*leaves, 0.7, seen=seen), expected, leaves)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("horizon", "weight"), [(1, 0.0), (3, 0.0), (3, 0.2)])
def test_sampled(places, horizon, weight):
    """Negatives come twice, some are what a target has seen, some the target itself."""
    seen, target_ids, log_weights, vectors = problem(PLACES[places], horizon, weight)
    query, aim, items = leaves = [x.requires_grad_() for x in vectors]
    negative_ids = torch.tensor([3, 3, 0, 18, 7, 11, 3, 2])
    log_q = torch.linspace(-1, 1, 8, dtype=torch.float64)
    given = query, items[target_ids], items[negative_ids], target_ids, negative_ids, log_q, 0.7, aim
    ours = sampled_softmax(*given, seen_places=seen.places(negative_ids), seen_log_weight=seen.log_weight)
    scores = query @ items.t() / 0.7
    negative = (scores + log_weights)[:, negative_ids] - log_q
    negative = negative.masked_fill(target_ids.unsqueeze(1) == negative_ids, -torch.inf)
    positive = scores.gather(1, target_ids.unsqueeze(1))
    expected = torch.cat([positive, negative], dim=1).logsumexp(1) - (query * aim).sum(1) / 0.7
    check(ours, expected, leaves)


def test_who_has_seen_all_but_the_target_has_no_loss():
    item_ids = torch.arange(NUM_ITEMS)
    seen = seen_before(item_ids, torch.tensor([0, NUM_ITEMS]), torch.tensor([NUM_ITEMS - 1]), 1, 0.0)
    query, items = torch.randn(1, 4, requires_grad=True), torch.randn(NUM_ITEMS, 4, requires_grad=True)
    loss = full_softmax(query, items[-1:], items, seen=seen)
    assert_close(loss, torch.zeros(1), rtol=0, atol=1e-6)
    for grad in torch.autograd.grad(loss.sum(), [query, items]):
        assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-5)
    places = seen.places(item_ids)
    assert places.tolist() == list(range(NUM_ITEMS - 1))
    sampled = sampled_softmax(query, items[-1:], items, item_ids[-1:], item_ids, None, seen_places=places)
    assert_close(sampled, torch.zeros(1), rtol=0, atol=1e-6)


def test_a_rank_of_whose_items_all_are_seen_adds_nothing(monkeypatch):
    """Its sum is that of nothing, and gradients are those of the aim's score alone."""
    monkeypatch.setattr(softmax, "COLUMNS_AT_ONCE", 0)  # as on several ranks
    seen = seen_before(torch.arange(NUM_ITEMS), torch.tensor([0, NUM_ITEMS]), torch.tensor([NUM_ITEMS - 1]), 1, 0.0)
    query, items = torch.randn(1, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = full_softmax(query, torch.zeros(1, 4), items, seen=seen, first_item=7)
    assert loss.tolist() == [-torch.inf]
    (loss.logaddexp(torch.zeros(1))).backward()  # as a part of the whole sum
    assert not query.grad.any()
    assert not items.grad.any()


def test_kernels_that_cannot_are_refused():
    seen, target_ids, _, (query, aim, items) = problem(PLACES[CAUSAL], 1, 0.0)
    with pytest.raises(InputError, match=r"full_softmax: implementation is 'triton'.* and seen is given"):
        full_softmax(query, aim, items, seen=seen, implementation="triton")
    given = query, aim, items, target_ids, target_ids, None
    with pytest.raises(InputError, match=r"sampled_softmax: implementation is 'triton'.* no seen_places"):
        sampled_softmax(*given, seen_places=target_ids[:0], implementation="triton")
