"""The laws of ENCODERS.md for GLINT-RU, and the preset of the published code."""

import math
from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from glintru_rec import GlintRU
from glintru_rec.encoders import build_encoder
from glintru_rec.encoders.glint_ru import load_published_weights
from glintru_rec.errors import InputError
from glintru_rec.jagged import offsets_from_lengths
from tests.encoder_laws import elu, gelu, layer_norm, linear, silu

PublishedGlintRU = run_path(str(Path(__file__).parents[1] / "tools" / "published_formulation.py"))["PublishedGlintRU"]

VARIANTS = {
    "default": {},
    "light": {"gated_mlp": False},
    "bidirectional": {"causal": False},
    "shared norm": {"share_norm": True, "embedding_norm": False},
    "two blocks": {"num_blocks": 2},
    "1 tap": {"kernel_size": 1},
    "5 taps": {"kernel_size": 5},
    "5 taps, bidirectional": {"kernel_size": 5, "causal": False},
    "one head": {"num_heads": 1},
    "no gru": {"gru_expert": False},
    "no gru, light, two blocks": {"gru_expert": False, "gated_mlp": False, "num_blocks": 2},
    "no gru, bidirectional": {"gru_expert": False, "causal": False},
    "no attention": {"attention_expert": False},
    "no attention, bidirectional": {"attention_expert": False, "causal": False},
    "no gate": {"selective_gate": False},
    "no gate, 1 tap, bidirectional": {"selective_gate": False, "kernel_size": 1, "causal": False},
    "no gate, no attention": {"selective_gate": False, "attention_expert": False},
    "bare": {"selective_gate": False, "attention_expert": False, "gated_mlp": False, "kernel_size": 1, "num_blocks": 2},
}
CAUSAL = {name: options for name, options in VARIANTS.items() if options.get("causal", True)}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def make(width=8, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    encoder = GlintRU(width, **options).to(dtype).eval()
    shake(encoder)
    return encoder


def shake(module):
    """Move what starts at 0, 1 or ½ (biases, norms, mixing weights), where a mistake would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))


def offsets_of(lengths):
    return offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def draw(lengths, width=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64).to(dtype)


# --- ENCODERS.md §1, one item after another


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def convolution(layer, xs, causal):
    taps = layer.weight.size(2)
    first = -(taps - 1) if causal else -(taps // 2)
    result = []
    for n in range(len(xs)):
        y = layer.bias
        for j in range(taps):
            if 0 <= n + first + j < len(xs):
                y = y + layer.weight[:, :, j] @ xs[n + first + j]
        result.append(y)
    return result


def attention_expert(expert, es, causal):
    num_heads = expert.num_heads
    d = es[0].numel() // num_heads
    a = [[] for _ in es]
    for head in range(num_heads):
        part = slice(head * d, (head + 1) * d)
        q = [elu(linear(expert.query, e)[part]) for e in es]
        k = [elu(linear(expert.key, e)[part]) for e in es]
        v = [linear(expert.value, e)[part] for e in es]
        for n in range(len(es)):
            seen = range(n + 1) if causal else range(len(es))
            state = sum(torch.outer(k[m] / k[m].square().sum().sqrt(), v[m]) for m in seen)
            a[n].append((q[n] / q[n].square().sum().sqrt()) @ state / math.sqrt(d))
    return [layer_norm(expert.norm, linear(expert.out, torch.cat(heads)) + e) for heads, e in zip(a, es)]


def gru_expert(expert, es, causal):
    cs = convolution(expert.conv_in, [linear(expert.dense_in, e) for e in es], causal)
    h, gated = torch.zeros_like(es[0]), []
    for c in cs:
        i_r, i_z, i_n = (expert.weight_ih @ c).chunk(3)
        h_r, h_z, h_n = (expert.weight_hh @ h).chunk(3)
        r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
        h = (1 - z) * torch.tanh(i_n + r * h_n) + z * h
        phi = linear(expert.channel_crossing, h)
        gated.append(phi if expert.gate_up is None else linear(expert.gate_up, silu(linear(expert.gate_down, c))) * phi)
    return convolution(expert.conv_out, gated, causal)


def reference(encoder, x, causal):
    """The equations for one sequence, ``[N, D]``, dropout off."""
    norm = encoder.embedding_norm
    es = [layer_norm(norm, e) if isinstance(norm, torch.nn.LayerNorm) else e for e in x]
    for block in encoder.blocks:
        if block.gru is None:
            ms = attention_expert(block.attention, es, causal)
        elif block.attention is None:
            ms = gru_expert(block.gru, es, causal)
        else:
            alpha = block.expert_weights.exp() / block.expert_weights.exp().sum()
            ys, as_ = gru_expert(block.gru, es, causal), attention_expert(block.attention, es, causal)
            ms = [alpha[0] * y + alpha[1] * a for y, a in zip(ys, as_)]
        out = []
        for e, m in zip(es, ms):
            z = layer_norm(block.mix_norm, linear(block.mix_out, gelu(linear(block.mix_gate, e)) * m) + e)
            if block.mlp is not None:
                p = gelu(linear(block.mlp.gate, z)) * linear(block.mlp.up, z)
                z = layer_norm(block.mlp_norm, linear(block.mlp.down, p) + z)
            out.append(z)
        es = out
    return torch.stack(es)


@each_variant
@pytest.mark.parametrize("length", [1, 2, 19])
def test_reference_law(options, length):
    encoder, x = make(**options), draw([length])
    with torch.no_grad():
        expected = reference(encoder, x, options.get("causal", True))
        assert_close(encoder(x, offsets_of([length])), expected, rtol=1e-10, atol=1e-10)


@each_variant
def test_gradients_of_the_reference(options):
    lengths = [1, 18, 0, 3]
    encoder, x = make(**options), draw(lengths).requires_grad_()
    leaves = [x, *encoder.parameters()]
    weights = draw(lengths, seed=2)
    result = torch.autograd.grad((encoder(x, offsets_of(lengths)) * weights).sum(), leaves)
    members = [reference(encoder, member, options.get("causal", True)) for member in x.split(lengths) if len(member)]
    expected = torch.autograd.grad((torch.cat(members) * weights).sum(), leaves)
    assert all(bool(gradient.any()) for gradient in expected)
    assert_close(result, expected, rtol=1e-9, atol=1e-9)


# --- laws


@each_variant
def test_ragged_law(options):
    encoder = make(**options)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 21), max_size=6))
    def law(lengths):
        x = draw(lengths)
        with torch.no_grad():
            together = encoder(x, offsets_of(lengths))
            alone = [encoder(member, offsets_of([len(member)])) for member in x.split(lengths)] if lengths else [x]
        assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)

    law()


@each_variant
def test_other_sequences_change_nothing_to_the_last_bit(options):
    encoder, lengths = make(**options), [17, 20, 5]
    x = draw(lengths)
    other = x.clone()
    other[:17] = 100 * draw([17], seed=2)
    other[-5:] = draw([5], seed=3)
    with torch.no_grad():
        assert torch.equal(encoder(other, offsets_of(lengths))[17:37], encoder(x, offsets_of(lengths))[17:37])


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("changed", [0, 1, 15, 16, 35])
def test_causality_law(options, changed):
    encoder, lengths = make(**options), [2, 36, 3]
    x, here = draw(lengths), slice(2, 38)
    later = x.clone()
    later[2 + changed] = draw([1], seed=2)[0]  # adding a constant would vanish in the LayerNorm
    with torch.no_grad():
        before, after = encoder(x, offsets_of(lengths))[here], encoder(later, offsets_of(lengths))[here]
    assert torch.equal(before[:changed], after[:changed])
    assert bool((before[changed:] != after[changed:]).any(1).all())  # and what comes after it does see it


def test_bidirectional_sees_all_items_from_every_position():
    encoder, x, offsets = make(causal=False), draw([20]).requires_grad_(), offsets_of([20])
    for position in (0, 9, 19):
        (gradient,) = torch.autograd.grad(encoder(x, offsets)[position].square().sum(), x)
        assert bool(gradient.any(1).all())
    causal = make()
    causal.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert not torch.isclose(encoder(x, offsets), causal(x, offsets)).all(1).any()


@each_variant
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0], [0, 3, 0, 0, 1]])
def test_empty_and_short_sequences(options, lengths):
    encoder, x = make(dtype=torch.float32, **options).train(), draw(lengths, dtype=torch.float32).requires_grad_()
    hidden = encoder(x, offsets_of(lengths))
    assert hidden.shape == (sum(lengths), 8)
    assert bool(hidden.isfinite().all())
    hidden.square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in encoder.parameters())


LONG = [{}, {"causal": False}, {"gru_expert": False}, {"attention_expert": False}, {"selective_gate": False}]


@pytest.mark.parametrize("options", LONG, ids=str)
def test_100_000_items_stay_finite(options):
    encoder, lengths = make(dtype=torch.float32, **options), [100_000, 2]
    with torch.no_grad():
        hidden = encoder(draw(lengths, dtype=torch.float32), offsets_of(lengths))
    assert bool(hidden.isfinite().all())


PLAIN = {"causal": False, "embedding_norm": False, "share_norm": True}


@pytest.mark.parametrize(("preset", "num_blocks"), [({}, 1), (PLAIN, 1), ({}, 2), (PLAIN, 2), ({}, 3)])
def test_zero_rows_stay_finite(preset, num_blocks):
    """As initialised: biases are zero, so elu(0) = 0 meets a norm of 0."""
    torch.manual_seed(0)
    encoder = GlintRU(16, num_blocks=num_blocks, dropout=0.0, **preset)
    x = torch.randn(8, 16)
    x[[0, 3]] = 0
    x.requires_grad_()
    hidden = encoder(x, torch.tensor([0, 5, 8]))
    (hidden * torch.randn_like(hidden)).sum().backward()
    assert bool(hidden.isfinite().all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in encoder.parameters())


# --- the module


@each_variant
def test_gradients_reach_every_parameter_as_initialised(options):
    torch.manual_seed(0)
    encoder = GlintRU(8, **options)
    hidden = encoder(torch.randn(12, 8), offsets_of([7, 5]))
    (hidden * torch.randn_like(hidden)).sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


@each_variant
@pytest.mark.parametrize("lengths", [[4, 0, 37, 1], [0, 0], []])
def test_scripted_equals_eager(options, lengths):
    encoder, x = make(**options), draw(lengths)
    with torch.no_grad():
        scripted = torch.jit.script(encoder)(x, offsets_of(lengths))
        assert_close(scripted, encoder(x, offsets_of(lengths)), rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_alone():
    encoder, x, offsets = make(dropout=0.5), draw([9]), offsets_of([9])
    with torch.no_grad():
        assert torch.equal(encoder(x, offsets), encoder(x, offsets))
        encoder.train()
        assert not torch.equal(encoder(x, offsets), encoder(x, offsets))


def dropout_rates(encoder):
    (block,) = encoder.blocks
    places = [encoder.dropout, block.attention.dropout, block.gru.gate_dropout, block.mix_dropout, block.mlp.dropout]
    return [place.p for place in places]


def test_dropout_rates():
    assert dropout_rates(GlintRU(8, dropout=0.1)) == [0.1] * 5
    assert dropout_rates(GlintRU(8, dropout=0.1, gate_dropout=0.0, mix_dropout=0.4, mlp_dropout=0.5)) == [
        0.1,
        0.1,
        0.0,
        0.4,
        0.5,
    ]
    assert dropout_rates(GlintRU.published()) == [0.2, 0.2, 0.3, 0.3, 0.3]


def count(encoder):
    return sum(parameter.numel() for parameter in encoder.parameters())


def test_light_lacks_the_gated_mlp():
    width = 32
    assert count(GlintRU(width)) - count(GlintRU(width, gated_mlp=False)) == 3 * (width * width + width) + 2 * width
    assert count(GlintRU(width)) - count(GlintRU(width, share_norm=True)) == 2 * width


def test_an_ablated_model_lacks_what_was_left_out_and_nothing_else():
    width = 32
    linear_layer, conv, gate = width * width + width, 3 * width * width + width, width * width + width // 2 + width
    left_out = {
        "gru_expert": ("gru.", "expert_weights", 2 * linear_layer + 2 * conv + 6 * width * width + gate + 2),
        "attention_expert": ("attention.", "expert_weights", 4 * linear_layer + 2 * width + 2),
        "selective_gate": ("gru.gate_down.", "gru.gate_up.", gate),
    }
    whole = dict(GlintRU(width).blocks[0].named_parameters())
    for option, (one, other, size) in left_out.items():
        encoder = GlintRU(width, **{option: False})
        assert count(GlintRU(width)) - count(encoder) == size
        rest = {name: parameter.shape for name, parameter in encoder.blocks[0].named_parameters()}
        assert rest == {name: value.shape for name, value in whole.items() if not name.startswith((one, other))}
    assert "gate_dropout" not in dict(GlintRU(width, selective_gate=False).blocks[0].gru.named_modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"kernel_size": -1}, "kernel_size is -1; it must be at least 1"),
        ({"num_blocks": 0}, "num_blocks is 0; it must be at least 1"),
        ({"num_heads": 5}, "num_heads 5 does not divide width 64"),
        ({"gru_expert": False, "attention_expert": False}, "gru_expert and attention_expert are both False"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and less than 1"),
        ({"gate_dropout": -0.1}, "gate_dropout is -0.1"),
        ({"mix_dropout": 2}, "mix_dropout is 2"),
        ({"mlp_dropout": math.nan}, "mlp_dropout is nan"),
    ],
)
def test_constructor_errors_name_the_value(options, message):
    with pytest.raises(InputError, match=message):
        GlintRU(**{"width": 64, **options})


def test_build_encoder():
    encoder = build_encoder("glint_ru", 32, {"num_heads": 2, "causal": False})
    assert isinstance(encoder, GlintRU)
    assert (encoder.width, encoder.causal) == (32, False)
    with pytest.raises(InputError, match=r"model.encoder is 'transformer'; it must be one of .*glint_ru"):
        build_encoder("transformer", 32, {})
    with pytest.raises(InputError, match=r"model.options.heads is not an option of glint_ru; it has num_heads, "):
        build_encoder("glint_ru", 32, {"heads": 2})


# --- the published code


def make_published(dtype, num_items=13, width=16, num_heads=4):
    torch.manual_seed(3)
    published = PublishedGlintRU(num_items, width, num_heads).to(dtype).eval()
    shake(published)
    encoder = GlintRU.published(width, num_heads).to(dtype).eval()
    load_published_weights(encoder, published.state_dict())
    return published, encoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_published_numbers_of_full_length_sequences(dtype, tolerance):
    published, encoder = make_published(dtype)
    item_seq = torch.randint(1, 14, (5, 21))
    embeddings = published.item_embedding(item_seq)
    with torch.no_grad():
        hidden = encoder(embeddings.flatten(0, 1), offsets_of([21] * 5)).view(5, 21, 16)
        assert_close(hidden, published.encode(embeddings), rtol=0, atol=tolerance)
        assert_close(hidden[:, -1], published(item_seq, torch.full((5,), 21)), rtol=0, atol=tolerance)


def test_published_preset_without_padding():
    """A sequence gives what the published code gives for it alone, whatever is in the batch; padded it gives another."""
    published, encoder = make_published(torch.float64)
    lengths = [9, 1, 21, 4]
    item_seq = torch.zeros(4, 21, dtype=torch.int64)
    for row, length in zip(item_seq, lengths):
        row[:length] = torch.randint(1, 14, (length,))
    with torch.no_grad():
        flat = torch.cat([row[:length] for row, length in zip(item_seq, lengths)])
        hidden = encoder(published.item_embedding(flat), offsets_of(lengths)).split(lengths)
        padded = published(item_seq, torch.tensor(lengths))
        for row, length, ours, theirs in zip(item_seq, lengths, hidden, padded):
            alone = published(row[:length].unsqueeze(0), torch.tensor([length]))
            assert_close(ours[-1:], alone, rtol=0, atol=1e-10)
            assert torch.allclose(ours[-1], theirs, atol=1e-3) == (length == 21)


def test_published_preset():
    encoder = GlintRU.published()
    (block,) = encoder.blocks
    assert (encoder.width, block.attention.num_heads, block.gru.conv_in.kernel_size, encoder.causal) == (128, 8, (3,), False)
    assert block.mlp_norm is block.mix_norm
    assert isinstance(encoder.embedding_norm, torch.nn.Identity)


def test_published_weights_copy_every_one_but_the_embedding():
    published, encoder = make_published(torch.float64)
    theirs = {name: value for name, value in published.state_dict().items() if name != "item_embedding.weight"}
    assert sum(value.numel() for value in theirs.values()) == count(encoder)
    ours = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
    assert torch.equal(ours.sort().values, torch.cat([value.flatten() for value in theirs.values()]).sort().values)


def test_published_weights_missing():
    published, encoder = make_published(torch.float64)
    weights = published.state_dict()
    del weights["gru_layers.weight_hh_l0"]
    with pytest.raises(InputError, match=r"hold no 'gru_layers.weight_hh_l0', which GlintRU's 'gru.weight_hh' needs"):
        load_published_weights(encoder, weights)


def test_published_weights_of_another_width():
    published, _ = make_published(torch.float64)
    with pytest.raises(InputError, match=r"has shape \[.*16.*\]; GlintRU's '.*' has \[.*32.*\]"):
        load_published_weights(GlintRU.published(32, 4), published.state_dict())
