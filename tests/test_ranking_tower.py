"""The sequence tower and the ranking model, as laws over values."""

import math
from itertools import chain

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from glintru_rec.encoders import GlintRU, SASRec
from glintru_rec.errors import InputError
from glintru_rec.ranking.batches import RankingBatch
from glintru_rec.ranking.model import RankingModel, RankingModelConfig
from glintru_rec.ranking.tower import CANDIDATE, RunningMean, SequenceTower

FEATURES = {"item": 50, "rating": 6}
# Histories of 3, 0 and 2 events, with 2, 1 and 3 candidates, which see different parts of them.
LENGTHS, CANDIDATE_LENGTHS = [3, 0, 2], [2, 1, 3]
SEEN = torch.tensor([2, 3, 0, 2, 1, 0])
OWNER = [0, 0, 1, 2, 2, 2]


def make_histories(seed: int = 0) -> tuple[KeyedJaggedTensor, list[list[int]], list[list[int]], list[int]]:
    torch.manual_seed(seed)
    items = [torch.randint(1, 50, (n,)).tolist() for n in LENGTHS]
    ratings = [torch.randint(1, 6, (n,)).tolist() for n in LENGTHS]
    candidates = torch.randint(1, 50, (sum(CANDIDATE_LENGTHS),)).tolist()
    values = [*chain(*items), *chain(*ratings), *candidates]
    lengths = torch.tensor([*LENGTHS, *LENGTHS, *CANDIDATE_LENGTHS])
    return KeyedJaggedTensor([*FEATURES, CANDIDATE], torch.tensor(values), lengths=lengths), items, ratings, candidates


def make_tower(encoder: nn.Module | None = None, **options) -> SequenceTower:
    torch.manual_seed(1)
    encoder = encoder or GlintRU(16, num_heads=2)
    return SequenceTower(FEATURES, encoder, init_std=0.5, num_heads=2, **options).eval()


def rows(tower: SequenceTower, feature: str, ids: list[int]) -> torch.Tensor:
    table = tower.embeddings.embeddings[f"t_{feature}"].weight
    return table[torch.tensor(ids, dtype=torch.int64)]


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("encoder", [GlintRU, SASRec, RunningMean])
def test_query_is_the_encoding_of_what_a_candidate_has_seen(combine, encoder):
    """Candidates that share a pass get what each alone, with its own history cut to what it may see, would get."""
    tower = make_tower(encoder(16), combine=combine, output="query")
    histories, items, ratings, _ = make_histories()
    (query,) = tower(histories, SEEN)
    for place, (owner, seen) in enumerate(zip(OWNER, SEEN.tolist())):
        if seen == 0:
            assert not query[place].any()
            continue
        parts = [rows(tower, "item", items[owner][:seen]), rows(tower, "rating", ratings[owner][:seen])]
        x = sum(parts) if combine == "sum" else tower.mix(torch.cat(parts, dim=1))
        alone = tower.encoder(x, torch.tensor([0, seen]))
        torch.testing.assert_close(query[place], alone[-1], atol=1e-5, rtol=1e-5)


def naive_attention(heads: nn.MultiheadAttention, query: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Multi-head attention with one more key and value of zeros, in float64 loops."""
    wq, wk, wv = heads.in_proj_weight.double().chunk(3)
    bq, bk, bv = heads.in_proj_bias.double().chunk(3)
    q, k, v = wq @ query.double() + bq, hidden.double() @ wk.T + bk, hidden.double() @ wv.T + bv
    width = q.numel() // heads.num_heads
    found = torch.zeros_like(q)
    for head in range(heads.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = [(q[part] @ key[part]).item() / math.sqrt(width) for key in k] + [0.0]
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        for weight, value in zip(weights, v):  # the zeros add nothing
            found[part] += weight * value[part]
    return heads.out_proj.weight.double() @ found + heads.out_proj.bias.double()


def test_attention_is_the_candidates_over_what_it_has_seen():
    tower = make_tower(output="both")
    nn.init.normal_(tower.attention.heads.in_proj_bias)
    nn.init.normal_(tower.attention.heads.out_proj.bias)
    histories, items, ratings, candidates = make_histories()
    query, attended = tower(histories, SEEN)
    for place, (owner, seen) in enumerate(zip(OWNER, SEEN.tolist())):
        hidden = torch.zeros(0, 16)
        if seen:
            x = rows(tower, "item", items[owner][:seen]) + rows(tower, "rating", ratings[owner][:seen])
            hidden = tower.encoder(x, torch.tensor([0, seen]))
        expected = naive_attention(tower.attention.heads, rows(tower, "item", [candidates[place]])[0], hidden)
        torch.testing.assert_close(attended[place].double(), expected, atol=1e-5, rtol=1e-5)
    (alone,) = make_tower(output="attention")(histories, SEEN)
    assert alone.shape == attended.shape == query.shape == (6, 16)


def test_nothing_seen_by_anyone():
    """No history at all: no events, candidates only."""
    tower = make_tower(output="both")
    lengths = torch.tensor([0, 0, 0, 0, 2, 1])
    histories = KeyedJaggedTensor([*FEATURES, CANDIDATE], torch.tensor([7, 8, 9]), lengths=lengths)
    query, attended = tower(histories, torch.zeros(3, dtype=torch.int64))
    assert not query.any()
    torch.testing.assert_close(attended, attended[:1].expand(3, -1))


def test_frozen_tower_keeps_encoder_and_items():
    tower = make_tower(output="both")
    tower.freeze()
    histories, *_ = make_histories()
    sum(output.square().sum() for output in tower(histories, SEEN)).backward()
    assert all(parameter.grad is None for parameter in tower.encoder.parameters())
    assert tower.embeddings.embeddings["t_item"].weight.grad is None
    assert tower.embeddings.embeddings["t_rating"].weight.grad.any()
    assert tower.attention.heads.in_proj_weight.grad.any()


def test_running_mean_does_not_depend_on_the_batch():
    x = torch.cat([torch.full((3, 4), 1e7), torch.randn(5, 4)])
    offsets = torch.tensor([0, 3, 3, 8])
    hidden = RunningMean(4)(x, offsets)
    for n in range(1, 6):
        torch.testing.assert_close(hidden[2 + n], x[3 : 3 + n].mean(dim=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "mean"}, "tower.combine is 'mean'"),
        ({"output": "all"}, "tower.output is 'all'"),
        ({"num_heads": 3}, "num_heads 3 does not divide"),
        ({"features": {"item": 5, "candidate": 5}}, "candidate"),
    ],
)
def test_tower_refuses(options, message):
    with pytest.raises(InputError, match=message):
        SequenceTower(**{"features": FEATURES, "encoder": GlintRU(16), **options})


@pytest.mark.parametrize("interaction", ["dcn", "dlrm"])
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("with_tower", [True, False])
def test_model_has_a_head_for_each_task_and_learns_everywhere(interaction, num_dense, with_tower):
    tower = make_tower(output="both") if with_tower else None
    config = RankingModelConfig(embedding_dim=8, interaction=interaction, dense_layers=[4], head_layers=[5])
    model = RankingModel(["click", "watch"], {"user": 9, "genres": 4}, num_dense, tower, config, init_std=0.5)
    sparse = KeyedJaggedTensor(
        ["user", "genres"],
        torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 3]),
        lengths=torch.tensor([1, 1, 1, 1, 1, 1, 2, 0, 1, 0, 0, 0]),
    )
    batch = RankingBatch(torch.randn(6, num_dense), sparse, make_histories()[0], SEEN, torch.zeros(6, 2), torch.arange(6))
    predicted = model(batch)
    assert predicted.shape == (6, 2)
    predicted.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
