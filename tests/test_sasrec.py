import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from glintru_rec.encoders.sasrec import PUBLISHED_NAMES, SASRec, load_published_weights
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.ops.softmax_attention import padded_groups, window_offsets
from tests import encoder_laws as laws
from tests.encoder_laws import PRECISIONS, draw, layer_norm, linear, make, shake

VARIANTS = [{}, {"num_blocks": 1, "num_heads": 8, "mlp_width": 5}, {"num_heads": 1, "max_seq_len": 7}]


def reference(encoder, x):
    """One sequence ``[N, D]`` that fits, position by position, straight from the equations."""
    width = x.size(1)
    xs = [e * math.sqrt(width) + encoder.positions.weight[n] for n, e in enumerate(x)]
    for block in encoder.blocks:
        heads = block.attention.num_heads
        d = width // heads
        projected = [linear(block.attention.query_key_value, layer_norm(block.norm, x_n)).chunk(3) for x_n in xs]
        out = []
        for n, x_n in enumerate(xs):
            attended = []
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                scores = [projected[n][0][part] @ k[part] / math.sqrt(d) for _, k, _ in projected[: n + 1]]
                weights = torch.stack(scores).exp()
                attended.append(sum(w * v[part] for w, (_, _, v) in zip(weights / weights.sum(), projected)))
            z = x_n + linear(block.attention.out, torch.cat(attended))
            inner = linear(block.up, layer_norm(block.mlp_norm, z))
            out.append(z + linear(block.down, torch.where(inner > 0, inner, 0)))
        xs = out
    return torch.stack([layer_norm(encoder.norm, x_n) for x_n in xs])


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", VARIANTS[:2])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_reference_law(options, length, dtype, tolerance):
    encoder = make(SASRec, **options)
    x, offsets = draw([length])
    with torch.no_grad():
        expected = reference(encoder, x)
        found = encoder.to(dtype)(x.to(dtype), offsets)
    assert_close(found.double(), expected, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from(VARIANTS))
def test_ragged_law(lengths, options):
    laws.check_ragged_law(make(SASRec, **options), lengths)


@pytest.mark.parametrize("changed", [0, 3, 20, 69, 70])
def test_causality_law(changed):
    laws.check_causality_law(make(SASRec), [3, 67, 0, 2], changed)


@pytest.mark.parametrize("length", [7, 8, 14, 20])
def test_long_sequences_are_windows_from_the_end(length):
    encoder = make(SASRec, max_seq_len=7)
    x, offsets = draw([length])
    with torch.no_grad():
        hidden = encoder(x, offsets)
        first = length % 7
        for start, end in [(0, first), *((s, s + 7) for s in range(first, length, 7))]:
            alone = encoder(x[start:end], torch.tensor([0, end - start]))
            assert_close(hidden[start:end], alone, rtol=1e-12, atol=1e-12)
        if length > 7:
            other = x.clone()
            other[length - 8] = 9.0  # an item that fell out of the last window
            assert torch.equal(encoder(other, offsets)[-7:], hidden[-7:])


def test_window_offsets():
    offsets = offsets_from_lengths(torch.tensor([3, 0, 4, 9]))
    assert window_offsets(offsets, 4).tolist() == [0, 3, 7, 8, 12, 16]
    assert window_offsets(offsets, 100).tolist() == [0, 3, 7, 16]
    assert window_offsets(torch.tensor([0]), 4).tolist() == [0]
    assert window_offsets(torch.tensor([0, 0]), 4).tolist() == [0]


def test_padding_is_bounded_and_depends_on_the_window_alone():
    lengths = [1, 8, 9, 16, 17, 200, 3]
    groups, places = padded_groups(offsets_from_lengths(torch.tensor(lengths)), sum(lengths))
    assert [(group.num_windows, group.length) for group in groups] == [(3, 8), (2, 16), (1, 32), (1, 256)]
    assert torch.equal(torch.cat([group.rows for group in groups])[places], torch.arange(sum(lengths)))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0]])
def test_empty_and_short(lengths, options):
    laws.check_ragged_law(make(SASRec, **options), lengths)


def test_100_000_items_stay_finite():
    laws.check_long(make(SASRec, 4, torch.float32), 100_000, 4)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_reach_every_parameter(options):
    laws.check_gradients(make(SASRec, **options))


def test_gradients_equal_those_of_the_reference():
    encoder = make(SASRec, 6, max_seq_len=9)
    x, offsets = draw([9], 6)
    weights = draw([9], 6, seed=4)[0]
    tensors = [x.requires_grad_(), *encoder.parameters()]
    found = torch.autograd.grad((encoder(x, offsets) * weights).sum(), tensors)
    expected = torch.autograd.grad((reference(encoder, x) * weights).sum(), tensors)
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS)
def test_scripted_equals_eager(options):
    for lengths in ([3, 0, 40], [], [0]):
        laws.check_scripted(make(SASRec, **options), lengths)


def test_there_is_no_recurrence():
    encoder = SASRec(8)
    for call in (
        lambda: encoder.init_state(1),
        lambda: encoder.prefill(*draw([3])),
        lambda: encoder.step(torch.zeros(1, 8), None),
    ):
        with pytest.raises(NotImplementedError, match="SASRec has no recurrent form"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 9}, "num_heads 2 does not divide width 9"),
        ({"width": 8, "num_blocks": 0}, "num_blocks is 0"),
        ({"width": 8, "num_heads": 0}, "num_heads is 0"),
        ({"width": 8, "max_seq_len": 0}, "max_seq_len is 0"),
        ({"width": 8, "mlp_width": 0}, "mlp_width is 0"),
        ({"width": 8, "dropout": 1.0}, r"dropout is 1\.0"),
        ({"width": 8, "attention_dropout": -0.5}, r"attention_dropout is -0\.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SASRec(**arguments)


def test_dropouts():
    x, offsets = draw([4, 3])
    for options in ({"dropout": 0.5, "attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.5}):
        encoder = make(SASRec, **options)
        assert torch.equal(encoder(x, offsets), encoder(x, offsets))
        encoder.train()
        assert not torch.equal(encoder(x, offsets), encoder(x, offsets))
    assert SASRec(8, dropout=0.3).blocks[0].attention.dropout == 0.3


def published_model(width, num_heads, max_seq_len, num_blocks=2):
    """Holds the weights under the published names, attention in torch's own module as there."""
    torch.manual_seed(5)
    root = nn.Module()
    root.item_emb, root.pos_emb = nn.Embedding(7, width), nn.Embedding(max_seq_len + 1, width)
    root.attention_layernorms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in range(num_blocks))
    root.attention_layers = nn.ModuleList(nn.MultiheadAttention(width, num_heads) for _ in range(num_blocks))
    root.forward_layernorms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in range(num_blocks))
    root.forward_layers = nn.ModuleList(nn.Module() for _ in range(num_blocks))
    for layer in root.forward_layers:
        layer.conv1, layer.conv2 = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)
    root.last_layernorm = nn.LayerNorm(width, eps=1e-8)
    shake(root)
    return root.double().eval()


def published_forward(root, x):
    """Full-length ``[B, N, D]``: the equations as the published code arranges them, with ``norm_first``."""
    length = x.size(1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = (x * math.sqrt(x.size(2)) + root.pos_emb.weight[1:]).transpose(0, 1)
    for norm, attention, mlp_norm, mlp in zip(
        root.attention_layernorms, root.attention_layers, root.forward_layernorms, root.forward_layers
    ):
        y = norm(x)
        x = x + attention(y, y, y, attn_mask=future)[0]
        x = x + mlp.conv2(torch.relu(mlp.conv1(mlp_norm(x).permute(1, 2, 0)))).permute(2, 0, 1)
    return root.last_layernorm(x).transpose(0, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_published_numbers(dtype, tolerance):
    root = published_model(12, 2, 19)
    encoder = SASRec.published(12, num_heads=2, max_seq_len=19).to(dtype).eval()
    load_published_weights(encoder, root.state_dict())
    x, offsets = draw([19] * 3, 12)
    with torch.no_grad():
        expected = published_forward(root, x.view(3, 19, 12)).flatten(0, 1)
        found = encoder(x.to(dtype), offsets)
    assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_published_weights_are_all_used():
    published = [name for name in published_model(8, 1, 5).state_dict() if not name.startswith("item_emb")]
    assert len(list(SASRec.published(8, max_seq_len=5).parameters())) == len(published)
    assert len(set(PUBLISHED_NAMES.values())) == len(PUBLISHED_NAMES)


def test_published_weights_that_do_not_fit():
    state = published_model(8, 1, 5).state_dict()
    with pytest.raises(InputError, match=r"'pos_emb.weight' has shape \[5, 8\]; .*'positions.weight' has \[6, 8\]"):
        load_published_weights(SASRec.published(8, max_seq_len=6), state)
    with pytest.raises(InputError, match=r"hold no 'attention_layernorms\.2\."):
        load_published_weights(SASRec.published(8, num_blocks=3, max_seq_len=5), state)


def test_initial_weights():
    encoder = SASRec(64)
    assert not encoder.blocks[0].up.bias.any()
    assert abs(float(encoder.positions.weight.detach().std()) - math.sqrt(2 / 264)) < 0.01
