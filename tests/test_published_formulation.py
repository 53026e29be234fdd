import math
from collections import Counter
from pathlib import Path
from runpy import run_path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.encoder_laws import elu, gelu, layer_norm, linear, silu

# A file, not a package: it is run and imported from the repository, and never installed.
published = run_path(str(Path(__file__).parents[1] / "tools" / "published_formulation.py"))
PublishedGlintRU, padded_prefix_batches = published["PublishedGlintRU"], published["padded_prefix_batches"]


def make_model(num_items=11, width=16, num_heads=4):
    torch.manual_seed(0)
    model = PublishedGlintRU(num_items, width, num_heads).double().eval()
    with torch.no_grad():  # biases, norms and mixing weights start at 0 and 1, where a mistake would not show
        for name, parameter in model.named_parameters():
            if not name.startswith("item_embedding"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def conv(layer, xs):
    result = []
    for n in range(len(xs)):
        out = layer.bias
        for j in (-1, 0, 1):
            if 0 <= n + j < len(xs):
                out = out + layer.weight[:, :, j + 1] @ xs[n + j]
        result.append(out)
    return result


def gru(layer, xs):
    h, result = torch.zeros_like(xs[0]), []
    for x in xs:
        ir, iz, inn = (layer.weight_ih_l0 @ x).chunk(3)
        hr, hz, hn = (layer.weight_hh_l0 @ h).chunk(3)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        h = (1 - z) * torch.tanh(inn + r * hn) + z * h
        result.append(h)
    return result


def attention(layer, es):
    heads = layer.num_heads
    d = es[0].numel() // heads
    result = [[] for _ in es]
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        state = torch.zeros(d, d, dtype=torch.float64)
        for e in es:
            k = elu(linear(layer.key, e)[part])
            state = state + torch.outer(k / k.square().sum().sqrt(), linear(layer.value, e)[part])
        for n, e in enumerate(es):
            q = elu(linear(layer.query, e)[part])
            result[n].append(q / q.square().sum().sqrt() @ state / math.sqrt(d))
    return [layer_norm(layer.LayerNorm, linear(layer.dense, torch.cat(a)) + e) for a, e in zip(result, es)]


def naive_block(model, embeddings):
    """One sequence ``[N, D]``, position by position."""
    es = list(embeddings)
    c = conv(model.conv1d, [linear(model.dense1, e) for e in es])
    gate_in, gate_out = model.selective_gate[0], model.selective_gate[2]
    gated = [
        linear(gate_out, silu(linear(gate_in, c_n))) * linear(model.projection, h)
        for c_n, h in zip(c, gru(model.gru_layers, c))
    ]
    alpha = model.weights.exp() / model.weights.exp().sum()
    result = []
    for e, y, a in zip(es, conv(model.conv1dforgru, gated), attention(model.linearattention, es)):
        mixed = gelu(linear(model.dense2, e)) * (alpha[0] * y + alpha[1] * a)
        z = layer_norm(model.LayerNorm, linear(model.dense, mixed) + e)
        p = gelu(linear(model.dense4, z)) * linear(model.dense3, z)
        result.append(layer_norm(model.LayerNorm, linear(model.denseout, p) + z))
    return torch.stack(result)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_forward_equals_the_equations(length):
    model = make_model()
    item_seq = torch.randint(1, 12, (3, length), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([naive_block(model, model.item_embedding(row)) for row in item_seq])
    torch.testing.assert_close(model.encode(model.item_embedding(item_seq)), expected, rtol=1e-11, atol=1e-11)
    last = model(item_seq, torch.full((3,), length))
    torch.testing.assert_close(last, expected[:, -1], rtol=1e-11, atol=1e-11)


def test_forward_takes_the_last_item_of_a_padded_prefix():
    model = make_model()
    item_seq = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    everywhere = model.encode(model.item_embedding(item_seq))
    assert torch.equal(model(item_seq, torch.tensor([2, 4])), torch.stack([everywhere[0, 1], everywhere[1, 3]]))


def test_it_looks_ahead_and_sees_padding():
    """What makes one target per prefix necessary, and why a causal ragged form is another model."""
    model = make_model()
    short = model(torch.tensor([[3, 4]]), torch.tensor([2]))
    assert not torch.allclose(short, model(torch.tensor([[3, 4, 0, 0]]), torch.tensor([2])))
    assert not torch.allclose(short, model(torch.tensor([[3, 4, 5]]), torch.tensor([2])))


def test_every_parameter_has_a_gradient():
    model = make_model().train()
    model.loss(torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([2, 3]), torch.tensor([9, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert not model.item_embedding.weight.grad[0].any()


def test_a_fresh_model_is_finite_on_padding():
    torch.manual_seed(0)
    model = PublishedGlintRU(20)
    loss = model.loss(torch.tensor([[3] + [0] * 199]), torch.tensor([1]), torch.tensor([20]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_loss_is_cross_entropy_over_the_items():
    model = make_model()
    item_seq, lengths, targets = torch.tensor([[3, 4], [5, 6]]), torch.tensor([2, 2]), torch.tensor([1, 11])
    scores = model(item_seq, lengths) @ model.item_embedding.weight.T
    scores[:, 0] = -math.inf
    torch.testing.assert_close(model.loss(item_seq, lengths, targets), cross_entropy(scores, targets))


def test_width_must_divide():
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        PublishedGlintRU(5, 10, 4)


HISTORIES = [[4, 2, 2, 0, 1, 3, 3], [], [5], [6, 0], [1, 2, 3, 4]]


def epoch(max_len, batch_size, seed=0):
    items = torch.tensor([item for history in HISTORIES for item in history])
    offsets = torch.tensor([0, *map(len, HISTORIES)]).cumsum(0)
    return list(padded_prefix_batches(items, offsets, max_len, batch_size, seed))


def flat(batches):
    return [
        (tuple(row.tolist()), int(length), int(target)) for batch in batches for row, length, target in zip(*batch, strict=True)
    ]


@pytest.mark.parametrize("max_len", [1, 3, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_prefixes_are_those_of_a_loop(max_len, batch_size):
    expected = Counter()
    for history in HISTORIES:
        for n in range(1, len(history)):
            prefix = [item + 1 for item in history[:n]][-max_len:]
            expected[(*prefix, *[0] * (max_len - len(prefix))), len(prefix), history[n] + 1] += 1
    batches = epoch(max_len, batch_size)
    assert Counter(flat(batches)) == expected
    assert all(targets.numel() == batch_size for _, _, targets in batches[:-1])


def test_prefixes_are_shuffled_by_the_seed():
    assert flat(epoch(5, 2, seed=1)) == flat(epoch(5, 2, seed=1))
    assert flat(epoch(5, 2, seed=1)) != flat(epoch(5, 2, seed=2))


def test_no_target_gives_no_batch():
    assert list(padded_prefix_batches(torch.tensor([3]), torch.tensor([0, 1]), 4, 2, 0)) == []
