import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from glintru_rec import GlintRU
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.model import SequenceModel

NUM_ITEMS, WIDTH = 40, 8


class PlainTable(nn.Module):
    """What a table is to the model; counts its exchanges."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_ITEMS, width, dtype=torch.float64))
        self.num_calls = 0

    def forward(self, item_ids, more_ids):
        self.num_calls += 1
        return self.weight[item_ids], self.weight[more_ids]


def make(similarity="dot", **options):
    """``similarity`` may be ``bias``: the dot product and a bias for each item, in rows as wide as fbgemm's."""
    torch.manual_seed(0)
    encoder = GlintRU(WIDTH, num_heads=2, **options).double()
    if similarity == "bias":
        return SequenceModel(PlainTable(WIDTH + 4), encoder, "dot", item_bias=True).eval()
    return SequenceModel(PlainTable(), encoder, similarity).eval()


def batch(lengths, seed=0):
    item_ids = torch.randint(NUM_ITEMS, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return item_ids, offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


NEGATIVES = torch.tensor([3, 3, 39])
NONE = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
def test_causal_pairs(similarity):
    """Every item but the first is a target once, and its query is what `encode` gives for the items before it."""
    model = make(similarity)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(2, 19), max_size=5))
    def law(lengths):
        item_ids, offsets = batch(lengths)
        with torch.no_grad():
            output = model(item_ids, offsets, NEGATIVES)
            members = item_ids.split(lengths) if lengths else []
            prefixes = [member[:n] for member in members for n in range(1, len(member))]
            targets = torch.cat([NONE, *[member[1:] for member in members]])
            prefix_lengths = [len(prefix) for prefix in prefixes]
            query, vectors = model.encode(torch.cat([NONE, *prefixes]), batch(prefix_lengths)[1], targets)
        assert torch.equal(output.target_ids, targets)
        assert torch.equal(output.positive, vectors)
        assert_close(output.query, query, rtol=1e-11, atol=1e-11)
        assert torch.equal(output.negatives, model.item_vectors(model.table.weight[NEGATIVES]))

    law()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
def test_aim_is_the_mean_of_what_follows(similarity):
    """Against a plain loop over sequences and positions; one item ahead it is the target itself."""
    model, lengths = make(similarity), [5, 2, 3, 9]
    item_ids, offsets = batch(lengths)
    with torch.no_grad():
        for horizon, decay in ((1, 0.5), (2, 0.5), (4, 0.3), (100, 1.0)):
            expected = []
            for member in item_ids.split(lengths):
                vectors = model.item_vectors(model.table.weight[member])
                for n in range(1, len(member)):
                    weights = [decay**k for k in range(min(horizon, len(member) - n))]
                    expected.append(sum(w * vectors[n + k] for k, w in enumerate(weights)) / sum(weights))
            output = model(item_ids, offsets, NEGATIVES, horizon, decay)
            assert_close(output.aim, torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert torch.equal(model(item_ids, offsets, NEGATIVES).aim, output.positive)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
def test_bidirectional_trains_on_the_last_item_alone(similarity):
    model, lengths = make(similarity, causal=False), [5, 2, 19]
    item_ids, offsets = batch(lengths)
    with torch.no_grad():
        output = model(item_ids, offsets, NEGATIVES)
        members = item_ids.split(lengths)
        targets = torch.stack([member[-1] for member in members])
        history = torch.cat([member[:-1] for member in members])
        query, vectors = model.encode(history, batch([4, 1, 18])[1], targets)
    assert torch.equal(output.target_ids, targets)
    assert torch.equal(output.positive, vectors)
    assert_close(output.query, query, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_prefixes(causal):
    """One pass over the sequence trains as one pass per prefix would."""
    model, lengths = make(causal=causal), [4, 2, 6]
    item_ids, offsets = batch(lengths)
    output = model(item_ids, offsets, NEGATIVES)
    loss = (output.query * output.positive).sum() + (output.query @ output.negatives.t()).square().sum()
    leaves = list(model.parameters())
    prefixes = [member[:n] for member in item_ids.split(lengths) for n in range(1 if causal else len(member) - 1, len(member))]
    ends = torch.tensor(
        [member[n] for member in item_ids.split(lengths) for n in range(1 if causal else len(member) - 1, len(member))]
    )
    query, vectors = model.encode(torch.cat(prefixes), batch([len(p) for p in prefixes])[1], torch.cat([ends, NEGATIVES]))
    expected = (query * vectors[: len(ends)]).sum() + (query @ vectors[len(ends) :].t()).square().sum()
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    assert all(bool(gradient.any()) for gradient in theirs)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_history_targets_and_negatives_come_in_one_exchange():
    model = make()
    model(*batch([4, 3]), NEGATIVES)
    assert model.table.num_calls == 1
    model.encode(*batch([4, 3]), NEGATIVES)
    assert model.table.num_calls == 2


@pytest.mark.parametrize("causal", [True, False])
def test_cosine_gives_unit_vectors(causal):
    model = make("cosine", causal=causal)
    with torch.no_grad():
        output = model(*batch([4, 3]), NEGATIVES)
        encoded = model.encode(*batch([4, 3]), NEGATIVES)
    for vectors in (output.query, output.positive, output.negatives, *encoded):
        assert_close(vectors.norm(dim=1), torch.ones(len(vectors), dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_cosine_is_the_scaled_dot():
    dot, cosine = make("dot"), make("cosine")
    with torch.no_grad():
        scores = [
            torch.matmul(query, items.t()) for query, items in (m.encode(*batch([4, 3]), NEGATIVES) for m in (dot, cosine))
        ]
        query, items = dot.encode(*batch([4, 3]), NEGATIVES)
    assert_close(scores[1], scores[0] / query.norm(dim=1, keepdim=True) / items.norm(dim=1), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores[0], scores[1])


@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
@pytest.mark.parametrize("causal", [True, False])
def test_empty_batch(causal, similarity):
    """What a rank gets when batches do not divide evenly among the ranks."""
    model = make(similarity, causal=causal).train()
    output = model(*batch([]), NEGATIVES)
    assert output.query.shape == output.positive.shape == (0, model.vector_dim)
    assert output.target_ids.shape == (0,)
    assert output.target_ids.dtype == torch.int64
    (output.query.sum() + output.positive.sum() + 0 * output.negatives.sum()).backward()
    for parameter in model.parameters():  # every gradient is there, for the ranks' all-reduce, and adds nothing
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
@pytest.mark.parametrize("causal", [True, False])
def test_empty_history_is_zeros(causal, similarity):
    model = make(similarity, causal=causal)
    item_ids, _ = batch([3, 2])
    with torch.no_grad():
        query, more = model.encode(item_ids, torch.tensor([0, 0, 3, 3, 5, 5]), NEGATIVES)
        without, _ = model.encode(item_ids, torch.tensor([0, 3, 5]), NEGATIVES)
        nothing, _ = model.encode(NONE, torch.tensor([0, 0, 0]), NONE)
    assert not query[[0, 2, 4], :WIDTH].any()
    assert_close(query[[1, 3]], without, rtol=1e-13, atol=1e-13)
    assert torch.equal(nothing, query[[0, 2]])
    assert more.shape == (3, model.vector_dim)


def test_unknown_similarity():
    with pytest.raises(InputError, match=r"model.similarity is 'euclid'; it must be one of dot, cosine"):
        SequenceModel(PlainTable(), GlintRU(WIDTH), "euclid")
