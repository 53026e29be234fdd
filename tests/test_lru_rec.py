import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glintru_rec.encoders.lru_rec import PUBLISHED_NAMES, LRURec, load_published_weights
from glintru_rec.errors import InputError
from tests import encoder_laws as laws
from tests.encoder_laws import PRECISIONS, draw, gelu, layer_norm, linear, make, shake

VARIANTS = [{}, {"num_blocks": 1, "state_width": 5}, {"num_blocks": 3, "state_width": 1, "embedding_norm": False}]


def reference(encoder, x):
    """One sequence ``[N, D]``, position by position, straight from the equations, over complex numbers."""
    xs = [layer_norm(encoder.embedding_norm, e) if isinstance(encoder.embedding_norm, nn.LayerNorm) else e for e in x]
    for block in encoder.blocks:
        lru = block.recurrence
        size = encoder.state_width
        decay = torch.exp(torch.complex(-torch.exp(lru.nu), torch.exp(lru.theta)))
        w_in = torch.complex(lru.dense_in.weight[:size], lru.dense_in.weight[size:])
        b_in = torch.complex(lru.dense_in.bias[:size], lru.dense_in.bias[size:])
        w_out = torch.complex(lru.dense_out.weight[:, :size], -lru.dense_out.weight[:, size:])
        h = torch.zeros_like(decay)
        out = []
        for x_n in xs:
            h = decay * h + torch.exp(lru.gamma_log) * (w_in @ x_n.to(w_in.dtype) + b_in)
            y = layer_norm(block.norm, (w_out @ h).real + lru.dense_out.bias + x_n)
            out.append(layer_norm(block.mlp_norm, linear(block.down, gelu(linear(block.up, y))) + y))
        xs = out
    return torch.stack(xs)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 65])
def test_reference_law(options, length, dtype, tolerance):
    encoder = make(LRURec, **options)
    x, offsets = draw([length])
    with torch.no_grad():
        expected = reference(encoder, x)
        found = encoder.to(dtype)(x.to(dtype), offsets)
    assert_close(found.double(), expected, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from(VARIANTS))
def test_ragged_law(lengths, options):
    laws.check_ragged_law(make(LRURec, **options), lengths)


@pytest.mark.parametrize("changed", [0, 3, 20, 69, 70])
def test_causality_law(changed):
    laws.check_causality_law(make(LRURec), [3, 67, 0, 2], changed)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("options", VARIANTS)
def test_step_law(options, dtype, tolerance):
    laws.check_step_law(make(LRURec, dtype=dtype, **options), 7, dtype, tolerance)


@pytest.mark.parametrize("lengths", [[3, 0, 1, 40], [0], [0, 0]])
def test_ragged_prefill(lengths):
    laws.check_ragged_prefill(make(LRURec), lengths)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0]])
def test_empty_and_short(lengths, options):
    laws.check_ragged_law(make(LRURec, **options), lengths)


def test_100_000_items_stay_finite():
    laws.check_long(make(LRURec, 3, torch.float32, num_blocks=1), 100_000, 3)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_reach_every_parameter(options):
    laws.check_gradients(make(LRURec, **options))


def test_gradients_equal_those_of_the_reference():
    """All of them, λ's through the hand-written backward pass too."""
    encoder = make(LRURec, 6)
    x, offsets = draw([9], 6)
    weights = draw([9], 6, seed=4)[0]
    tensors = [x.requires_grad_(), *encoder.parameters()]
    found = torch.autograd.grad((encoder(x, offsets) * weights).sum(), tensors)
    expected = torch.autograd.grad((reference(encoder, x) * weights).sum(), tensors)
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS)
def test_scripted_equals_eager(options):
    encoder = make(LRURec, **options)
    for lengths in ([3, 0, 40], [], [0]):
        laws.check_scripted(encoder, lengths)
        laws.check_scripted_recurrence(encoder, lengths)


class RealAlone(TorchDispatchMode):
    """Fails on any operator that gives complex numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in tree_leaves(out)), func
        return out


def test_real_numbers_alone():
    encoder = make(LRURec)
    with RealAlone():
        encoder(*draw([3, 2])).sum().backward()
        encoder.step(torch.zeros(2, 8, dtype=torch.float64), encoder.init_state(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 8, "num_blocks": 0}, "num_blocks is 0"),
        ({"width": 8, "state_width": 0}, "state_width is 0"),
        ({"width": 8, "dropout": 1.0}, r"dropout is 1\.0"),
        ({"width": 8, "recurrent_dropout": -0.5}, r"recurrent_dropout is -0\.5"),
        ({"width": 8, "max_radius": 1.0}, r"max_radius 1\.0"),
        ({"width": 8, "min_radius": 0.995}, r"min_radius 0\.995"),
        ({"width": 8, "min_radius": 0.0}, r"min_radius 0\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        LRURec(**arguments)


def test_initial_weights():
    encoder = LRURec(64)
    for block in encoder.blocks:
        lru = block.recurrence
        radius = torch.exp(-torch.exp(lru.nu.detach()))
        assert 0.8 - 1e-6 <= float(radius.min()) < 0.85
        assert 0.97 < float(radius.max()) <= 0.99 + 1e-6
        assert_close(torch.exp(lru.gamma_log.detach()), (1 - radius**2).sqrt(), rtol=1e-4, atol=1e-5)
        assert float(torch.exp(lru.theta.detach()).min()) > 0
        assert 5.5 < float(torch.exp(lru.theta.detach()).max()) < 6.2832
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.requires_grad_(False).parameters():
                assert float(parameter.abs().max()) <= 0.04
                assert 0.01 < float(parameter.std()) < 0.025


def test_dropouts():
    x, offsets = draw([4, 3])
    for options in ({"dropout": 0.5, "recurrent_dropout": 0.0}, {"dropout": 0.0, "recurrent_dropout": 0.5}):
        encoder = make(LRURec, **options)
        assert torch.equal(encoder(x, offsets), encoder(x, offsets))
        encoder.train()
        assert not torch.equal(encoder(x, offsets), encoder(x, offsets))
    assert LRURec(8, dropout=0.3).blocks[0].recurrent_dropout.p == 0.3


class PublishedBlock(nn.Module):
    """Holds a block's weights under the published names."""

    def __init__(self, width):
        super().__init__()
        self.lru_layer = nn.Module()
        self.lru_layer.params_log = nn.Parameter(torch.stack([torch.randn(2 * width) - 2, *torch.randn(2, 2 * width)]))
        self.lru_layer.in_proj = nn.Linear(width, 2 * width, dtype=torch.complex64)
        self.lru_layer.out_proj = nn.Linear(2 * width, width, dtype=torch.complex64)
        self.lru_layer.layer_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Module()
        self.feed_forward.w_1, self.feed_forward.w_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward.layer_norm = nn.LayerNorm(width)


def published_model(width, num_blocks=2):
    torch.manual_seed(5)
    root = nn.Module()
    root.embedding, root.model = nn.Module(), nn.Module()
    root.embedding.token = nn.Embedding(7, width)
    root.embedding.layer_norm = nn.LayerNorm(width)
    root.model.lru_blocks = nn.ModuleList(PublishedBlock(width) for _ in range(num_blocks))
    root.model.bias = nn.Parameter(torch.randn(7))
    shake(root)
    return root


def published_forward(root, x):
    """Left-padded ``[B, N, D]``, all in complex128: h_n = Σ_m λ^(n-m) b_m over the items that are not padding."""
    width, present = x.size(2), x.abs().sum(2) > 0

    def norm(layer, y):
        return nn.functional.layer_norm(y, [width], layer.weight.double(), layer.bias.double())

    def dense(layer, y):
        wide = torch.complex128 if layer.weight.is_complex() else torch.float64
        return y.to(wide) @ layer.weight.to(wide).T + layer.bias.to(wide)

    x = norm(root.embedding.layer_norm, x)
    n = torch.arange(x.size(1))
    for block in root.model.lru_blocks:
        nu, theta, gamma = block.lru_layer.params_log.double().exp()
        decay = torch.exp(torch.complex(-nu, theta))
        distance = (n[:, None] - n[None, :]).clamp(min=0)
        powers = torch.where((n[:, None] >= n[None, :])[..., None], decay ** distance[..., None], 0)
        inputs = dense(block.lru_layer.in_proj, x) * gamma * present[..., None]
        h = torch.einsum("nms,bms->bns", powers, inputs)
        y = norm(block.lru_layer.layer_norm, dense(block.lru_layer.out_proj, h).real + x)
        mlp = block.feed_forward
        x = norm(mlp.layer_norm, dense(mlp.w_2, nn.functional.gelu(dense(mlp.w_1, y))) + y)
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_published_numbers(dtype, tolerance):
    root = published_model(12)
    encoder = LRURec.published(12).to(dtype).eval()
    load_published_weights(encoder, root.state_dict())
    lengths = [9, 21, 1, 13]
    x, offsets = draw(lengths, 12)
    padded = torch.zeros(4, 21, 12, dtype=torch.float64)
    for row, part in zip(padded, x.split(lengths)):
        row[21 - len(part) :] = part
    with torch.no_grad():
        expected = published_forward(root, padded)
        found = encoder(x.to(dtype), offsets)
    expected = torch.cat([row[21 - length :] for row, length in zip(expected, lengths)])
    assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_published_weights_are_all_used():
    left_alone = ("embedding.token.weight", "model.bias")
    published = [name for name in published_model(8).state_dict() if name not in left_alone]
    ours = [name for name, _ in LRURec.published(8).named_parameters()]
    assert len(ours) == len(published) + 2 * 2  # three rows of params_log in each of two blocks
    assert len(set(PUBLISHED_NAMES.values())) == len(PUBLISHED_NAMES) - 2


def test_published_weights_that_do_not_fit():
    with pytest.raises(InputError, match=r"'embedding.layer_norm.weight' has shape \[8\]"):
        load_published_weights(LRURec.published(12), published_model(8).state_dict())
    with pytest.raises(InputError, match=r"hold no 'model\.lru_blocks\.1\."):
        load_published_weights(LRURec.published(8), published_model(8, 1).state_dict())
