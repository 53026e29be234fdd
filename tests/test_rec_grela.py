import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from glintru_rec.encoders.rec_grela import PUBLISHED_NAMES, RecGRELA, load_published_weights
from glintru_rec.encoders.rec_grela_block import DropPath, rotation
from glintru_rec.errors import InputError
from glintru_rec.ops.linear_attention import attention_reference, continue_attention, linear_attention
from glintru_rec.ops.normalized_attention import continue_normalized, normalized_attention, normalized_attention_reference
from glintru_rec.ops.rotary import rotate
from tests import encoder_laws as laws
from tests.encoder_laws import PRECISIONS, draw, elu, gelu, layer_norm, linear, make, shake, silu

VARIANTS = [
    {},
    {"causal": False},
    {"num_blocks": 1, "attention_residual": False, "kernel_size": 3},
    {"num_blocks": 2, "num_heads": 8, "kernel_size": 1, "embedding_norm": False},  # d = 1: rotary pairs span two heads
]


def reference(encoder, x):
    """One sequence ``[N, D]``, position by position, straight from the equations."""
    width, count, h = x.size(1), len(x), encoder.num_heads
    d = width // h
    xs = [layer_norm(encoder.embedding_norm, e) if isinstance(encoder.embedding_norm, nn.LayerNorm) else e for e in x]

    def rope(vector, n):
        turned = []
        for j in range(width // 2):
            angle = n * 10000 ** (-j / (width / 2))
            a, b = vector[2 * j], vector[2 * j + 1]
            turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        return torch.stack(turned)

    for block in encoder.blocks:
        qs, ks, q_rotary, k_rotary, vs, out = [], [], [], [], [], []
        for n, x_n in enumerate(xs):
            t = linear(block.dense_in, layer_norm(block.norm, x_n))
            q, k = (elu(linear(block.attention.query_key, t)) + 1).chunk(2)
            qs.append(q)
            ks.append(k)
            q_rotary.append(rope(q, n))
            k_rotary.append(rope(k, n))
            vs.append(t)
        for n, x_n in enumerate(xs):
            seen = range(n + 1) if encoder.causal else range(count)
            share = 1 if encoder.causal else 1 / count  # the bidirectional sums are means
            a = []
            for head in range(h):
                part = slice(head * d, (head + 1) * d)
                memory = share * sum(torch.outer(k_rotary[m][part], vs[m][part]) for m in seen)
                weights = share * qs[n][part] @ sum(ks[m][part] for m in seen)
                a.append(q_rotary[n][part] @ memory / (weights + 1e-6))
            conv, taps = block.attention.conv.bias, encoder.kernel_size
            for j in range(taps):
                if n - j >= 0:
                    conv = conv + block.attention.conv.weight[:, 0, taps - 1 - j] * vs[n - j]
            gate = silu(linear(block.gate, layer_norm(block.norm, x_n)))
            o = linear(block.dense_out, (torch.cat(a) + silu(conv)) * gate)
            z = x_n + o if block.attention_residual else o
            out.append(z + linear(block.mlp.down, gelu(linear(block.mlp.up, layer_norm(block.mlp_norm, z)))))
        xs = out
    return torch.stack(xs)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 18])
def test_reference_law(options, length, dtype, tolerance):
    encoder = make(RecGRELA, **options)
    x, offsets = draw([length])
    with torch.no_grad():
        expected = reference(encoder, x)
        found = encoder.to(dtype)(x.to(dtype), offsets)
    # Stacked blocks amplify float32's rounding; relative to the size of the output it stays at the tolerance.
    assert_close(found.double(), expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from(VARIANTS))
def test_ragged_law(lengths, options):
    laws.check_ragged_law(make(RecGRELA, **options), lengths)


@pytest.mark.parametrize("changed", [0, 3, 20, 69, 70])
def test_causality_law(changed):
    laws.check_causality_law(make(RecGRELA), [3, 67, 0, 2], changed)


def test_bidirectional_attends_to_later_items():
    encoder = make(RecGRELA, causal=False)
    x, offsets = draw([5])
    other = x.clone()
    other[4, 0] += 1
    assert not torch.allclose(encoder(x, offsets)[0], encoder(other, offsets)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", [{"num_blocks": 2}, *VARIANTS[2:]])
def test_step_law(options, dtype, tolerance):
    laws.check_step_law(make(RecGRELA, dtype=dtype, **options), 7, dtype, tolerance)


@pytest.mark.parametrize("lengths", [[3, 0, 1, 40], [0], [0, 0]])
def test_ragged_prefill(lengths):
    laws.check_ragged_prefill(make(RecGRELA, num_blocks=2), lengths)


def test_a_step_far_out_equals_forward():
    """Rotary angles are exact where float32 would be off by a hundredth of a turn."""
    encoder = make(RecGRELA, num_blocks=1, dtype=torch.float32)
    x, offsets = draw([20_001], dtype=torch.float32)
    with torch.no_grad():
        _, state = encoder.prefill(x[:-1], torch.tensor([0, 20_000]))
        out, state = encoder.step(x[-1:], state)
        assert_close(out, encoder(x, offsets)[-1:], rtol=0, atol=1e-4)
    assert state.position.dtype == torch.int64
    assert state.position.tolist() == [20_001]


def test_bidirectional_has_no_recurrence():
    encoder = RecGRELA(8, causal=False)
    with pytest.raises(ValueError, match="no recurrent form"):
        encoder.prefill(*draw([3], dtype=torch.float32))
    with pytest.raises(ValueError, match="no recurrent form"):
        encoder.step(torch.zeros(1, 8), encoder.init_state(1))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0]])
def test_empty_and_short(lengths, options):
    laws.check_ragged_law(make(RecGRELA, **options), lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_100_000_items_stay_finite(causal):
    laws.check_long(make(RecGRELA, 4, torch.float32, num_heads=2, num_blocks=2, causal=causal), 100_000, 4)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_reach_every_parameter(options):
    laws.check_gradients(make(RecGRELA, **options))


@pytest.mark.parametrize("options", VARIANTS)
def test_scripted_equals_eager(options):
    encoder = make(RecGRELA, **options)
    for lengths in ([3, 0, 40], [], [0]):
        laws.check_scripted(encoder, lengths)
        if encoder.causal:
            laws.check_scripted_recurrence(encoder, lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 9, "num_heads": 3}, "width is 9; it must be even"),
        ({"width": 10}, "num_heads 4 does not divide width 10"),
        ({"width": 8, "num_blocks": 0}, "num_blocks is 0"),
        ({"width": 8, "kernel_size": 0}, "kernel_size is 0"),
        ({"width": 8, "num_heads": -1}, "num_heads is -1"),
        ({"width": 8, "dropout": 1.0}, "dropout is 1.0"),
        ({"width": 8, "drop_path": -0.1}, "drop_path is -0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        RecGRELA(**arguments)


def test_drop_path_drops_whole_sequences():
    torch.manual_seed(0)
    x, offsets = draw([3] * 4000, 2)
    drop_path = DropPath(0.25)
    kept = (drop_path(x, offsets) / x).view(4000, 6)
    assert set(kept.mean(1).mul(1e9).round().tolist()) == {0.0, round(1e9 / 0.75)}
    assert abs(float((kept == 0).double().mean()) - 0.25) < 0.02
    assert torch.equal(drop_path.eval()(x, offsets), x)


def test_dropout_is_off_in_eval():
    encoder = make(RecGRELA, dropout=0.5, drop_path=0.5)
    x, offsets = draw([4, 3])
    assert torch.equal(encoder(x, offsets), encoder(x, offsets))
    encoder.train()
    assert not torch.equal(encoder(x, offsets), encoder(x, offsets))


def test_rotation_keeps_lengths_and_sees_distance_alone():
    q, k = draw([2], 12)[0]
    products = []
    for n, m in [(5, 2), (100_003, 100_000)]:
        cos, sin = rotation(torch.tensor([n, m]), 12)
        turned = rotate(torch.stack([q, k]).unsqueeze(1), cos, sin).squeeze(1)
        assert_close(turned.norm(dim=1), torch.stack([q, k]).norm(dim=1))
        products.append(turned[0] @ turned[1])
    assert_close(products[0], products[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [1], [65, 16, 17]])
def test_normalized_attention_equals_the_loop(lengths, causal):
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(lengths), 2, 3)] * 4 + [(sum(lengths), 2, 5)]
    inputs = [torch.rand(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    _, offsets = draw(lengths)
    found, expected = [
        function(*inputs, offsets, causal, 0.01) for function in (normalized_attention, normalized_attention_reference)
    ]
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_normalized_attention_gradients(causal):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.rand(6, 2, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(5)]
    _, offsets = draw([4, 0, 2])
    assert torch.autograd.gradcheck(lambda *x: normalized_attention(*x, offsets, causal, 0.1), inputs)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0], [1], [65, 16, 17]])
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_attention_continues_from_a_state(lengths, chunk_size):
    """Values of another width than keys; cut in two, with the state carried over, it is the same."""
    shapes = [(2 * sum(lengths), 2, 3)] * 2 + [(2 * sum(lengths), 2, 5)]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    _, whole = draw([2 * length for length in lengths])
    _, half = draw(lengths)
    starts = [(2 * start, length) for start, length in zip(half.tolist(), lengths)]
    halves = [
        [torch.cat([x[start + late * length : start + late * length + length] for start, length in starts]) for x in inputs]
        for late in (0, 1)
    ]
    expected = attention_reference(*inputs, whole, True)
    early, state = continue_attention(*halves[0], half, chunk_size=chunk_size)
    late, final = continue_attention(*halves[1], half, state, chunk_size)
    for b, (start, length) in enumerate(starts):
        rows = slice(int(half[b]), int(half[b + 1]))
        joined = torch.cat([early[rows], late[rows]])
        assert_close(joined, expected[start : start + 2 * length], rtol=1e-12, atol=1e-12)
        _, k, v = (x[start : start + 2 * length] for x in inputs)
        assert_close(final[b], torch.einsum("nhi,nhj->hij", k, v), rtol=1e-12, atol=1e-12)
    scripted = torch.jit.script(continue_attention)(*halves[1], half, state, chunk_size)
    assert_close(scripted, (late, final), rtol=1e-13, atol=1e-13)
    assert_close(linear_attention(*inputs, whole, True, chunk_size), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0], [1], [40, 16, 17]])
def test_normalized_attention_continues_from_a_state(lengths):
    """Cut in two, with the state carried over, it is the same, and so are the gradients of the first half."""
    shapes = [(2 * sum(lengths), 2, 3)] * 4 + [(2 * sum(lengths), 2, 5)]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    _, whole = draw([2 * length for length in lengths])
    _, half = draw(lengths)
    starts = [(2 * start, length) for start, length in zip(half.tolist(), lengths)]
    rows = [
        torch.cat([torch.arange(start + late * length, start + (late + 1) * length) for start, length in starts])
        for late in (0, 1)
    ]
    expected = normalized_attention_reference(*inputs, whole, True, 0.01)
    early, *state = continue_normalized(*(x[rows[0]] for x in inputs), half, True, 0.01)
    late, memory, key_sums = continue_normalized(*(x[rows[1]] for x in inputs), half, True, 0.01, 16, "auto", *state)
    assert_close(early, expected[rows[0]], rtol=1e-12, atol=1e-12)
    assert_close(late, expected[rows[1]], rtol=1e-12, atol=1e-12)
    for b, (start, length) in enumerate(starts):
        _, k, _, k_rotary, v = (x[start : start + 2 * length] for x in inputs)
        assert_close(memory[b], torch.einsum("nhi,nhj->hij", k_rotary, v), rtol=1e-12, atol=1e-12)
        assert_close(key_sums[b], k.sum(0), rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    loss = (early * weight[rows[0]]).sum() + (late * weight[rows[1]]).sum() + 0 * sum(x.sum() for x in inputs)
    of_halves = torch.autograd.grad(loss, inputs)
    of_whole = torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True, allow_unused=True)
    assert_close(of_halves, of_whole, rtol=1e-11, atol=1e-11)


class PublishedBlock(nn.Module):
    """Holds a block's weights under the published names."""

    def __init__(self, width):
        super().__init__()
        self.LayerNorm1, self.LayerNorm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.act_proj, self.in_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.attn = nn.Module()
        self.attn.qk = nn.Linear(width, 2 * width)
        self.attn.conv1d = nn.Conv1d(width, width, 4, groups=width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def published_model(width, num_blocks, blocks="GRELA_block"):
    torch.manual_seed(5)
    model = nn.Module()
    model.item_embedding = nn.Embedding(7, width)
    model.LayerNorm = nn.LayerNorm(width)
    setattr(model, blocks, nn.ModuleList(PublishedBlock(width) for _ in range(num_blocks)))
    shake(model)
    return model.double()


def published_forward(model, x, num_heads):
    """Padded ``[B, N, D]``, bidirectional, all positions at once: the equations as the published code arranges them."""
    batch, length, width = x.shape
    n = torch.arange(length, dtype=torch.float64)
    angle = torch.outer(n, 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2)))
    turn = torch.polar(torch.ones_like(angle), angle)

    def rope(y):
        return torch.view_as_real(torch.view_as_complex(y.reshape(batch, length, -1, 2)) * turn).reshape(batch, length, width)

    def split(y):
        return y.view(batch, length, num_heads, -1).transpose(1, 2)

    def norm(layer, y):
        return nn.functional.layer_norm(y, [width], layer.weight, layer.bias, 1e-12)

    x = norm(model.LayerNorm, x)
    for block in model.GRELA_block:
        y = norm(block.LayerNorm1, x)
        t = block.in_proj(y)
        q, k = (nn.functional.elu(block.attn.qk(t)) + 1).chunk(2, dim=2)
        weights = split(q) @ split(k).mean(2, keepdim=True).transpose(2, 3) + 1e-6
        a = split(rope(q)) @ (split(rope(k)).transpose(2, 3) @ split(t) / length) / weights
        conv = block.attn.conv1d(nn.functional.pad(t.transpose(1, 2), [3, 0])).transpose(1, 2)
        mixed = a.transpose(1, 2).reshape(x.shape) + nn.functional.silu(conv)
        o = block.out_proj(mixed * nn.functional.silu(block.act_proj(y)))
        x = x + o if len(model.GRELA_block) > 1 else o
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(norm(block.LayerNorm2, x))))
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_published_numbers(num_blocks, dtype, tolerance):
    model = published_model(16, num_blocks)
    encoder = RecGRELA.published(16, num_blocks).to(dtype).eval()
    load_published_weights(encoder, model.state_dict())
    x, offsets = draw([19] * 3, 16)
    with torch.no_grad():
        expected = published_forward(model, x.view(3, 19, 16), num_heads=4).flatten(0, 1)
        found = encoder(x.to(dtype), offsets)
    assert_close(found.double(), expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def test_published_weights_are_all_used():
    model = published_model(8, 2)
    encoder = RecGRELA.published(8, 2)
    ours = {name for name, _ in encoder.named_parameters()}
    assert len(ours) == len([name for name in model.state_dict() if not name.startswith("item_embedding")])
    assert len(set(PUBLISHED_NAMES.values())) == len(PUBLISHED_NAMES)
    older = RecGRELA.published(8, 2)
    load_published_weights(encoder, model.state_dict())
    load_published_weights(older, published_model(8, 2, "GLARE_block").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), older.parameters()))


def test_published_weights_that_do_not_fit():
    with pytest.raises(InputError, match=r"'LayerNorm.weight' has shape \[8\]; .*'embedding_norm.weight' has \[16\]"):
        load_published_weights(RecGRELA.published(16, 1), published_model(8, 1).state_dict())
    with pytest.raises(InputError, match=r"hold no 'GRELA_block\.1"):
        load_published_weights(RecGRELA.published(8, 2), published_model(8, 1).state_dict())


def test_initial_weights():
    encoder = RecGRELA(64)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert 0.015 < float(module.weight.detach().std()) < 0.025
