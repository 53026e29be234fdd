"""Laws that every encoder keeps, and the arithmetic that references are written in. Tests import them."""

import math

import torch
from torch import nn
from torch.testing import assert_close

from glintru_rec.jagged import offsets_from_lengths

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def make(encoder_class, width=8, dtype=torch.float64, **options):
    """An encoder whose norms and biases are not 0 and 1, where a mistake would not show."""
    torch.manual_seed(0)
    encoder = encoder_class(width, **options).to(dtype).eval()
    shake(encoder)
    return encoder


def shake(module, std=0.2):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))


def draw(lengths, width=8, dtype=torch.float64, seed=1):
    """Embeddings and offsets of a ragged batch."""
    x = torch.randn(sum(lengths), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype), offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


def check_ragged_law(encoder, lengths, width=8):
    """Encoding a batch equals encoding its sequences one by one."""
    x, offsets = draw(lengths, width)
    with torch.no_grad():
        hidden = encoder(x, offsets)
        assert hidden.shape == x.shape
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            alone = encoder(x[start:end], torch.tensor([0, end - start]))
            assert_close(hidden[start:end], alone, rtol=1e-11, atol=1e-11)


def check_causality_law(encoder, lengths, changed, width=8):
    """Changing one item leaves outputs before it, and other sequences', unchanged to the last bit; not its own."""
    x, offsets = draw(lengths, width)
    other = x.clone()
    other[changed, 0] += 1  # one feature: a LayerNorm takes away what all have in common
    sequence = int((offsets[1:] <= changed).sum())
    with torch.no_grad():
        hidden, after = encoder(x, offsets), encoder(other, offsets)
    end = int(offsets[sequence + 1])
    assert torch.equal(hidden[:changed], after[:changed])
    assert torch.equal(hidden[end:], after[end:])
    for n in range(changed, end):  # and each later position did look
        assert (hidden[n] - after[n]).abs().max() > 1e-9


def check_step_law(encoder, length, dtype, tolerance, width=8):
    """``prefill(x[:m])``, then a step for each later item, equals ``forward(x)``, for every m; two sequences at once."""
    x, offsets = draw([length, length], width, dtype)
    both = x.view(2, length, width)
    with torch.no_grad():
        expected = encoder(x, offsets).view(2, length, width)
        fresh = encoder.init_state(2)
        for m in range(length + 1):
            lengths = torch.tensor([m, m])
            hidden, state = encoder.prefill(both[:, :m].reshape(2 * m, width), offsets_from_lengths(lengths))
            assert_close(hidden.view(2, m, width), expected[:, :m], rtol=0, atol=tolerance)
            for part, of_fresh in zip(state, fresh):
                assert part.shape == of_fresh.shape
                assert part.dtype == of_fresh.dtype
                assert m > 0 or torch.equal(part, of_fresh)
            for n in range(m, length):
                out, state = encoder.step(both[:, n], state)
                assert_close(out, expected[:, n], rtol=0, atol=tolerance)


def check_ragged_prefill(encoder, lengths, width=8):
    """The state of a ragged batch is that of its sequences one by one, empty ones too; prefill is forward."""
    x, offsets = draw(lengths, width)
    with torch.no_grad():
        hidden, state = encoder.prefill(x, offsets)
        assert_close(hidden, encoder(x, offsets), rtol=1e-11, atol=1e-11)
        for b, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
            _, alone = encoder.prefill(x[start:end], torch.tensor([0, end - start]))
            for part, of_alone in zip(state, alone):
                assert_close(part[b], of_alone[0], rtol=1e-11, atol=1e-11)


def check_gradients(encoder, width=8):
    """Every parameter, and the input, get a gradient that is finite and not zero."""
    x, offsets = draw([3, 0, 1, 20], width)
    x.requires_grad_()
    encoder(x, offsets).square().sum().backward()
    for name, tensor in [*encoder.named_parameters(), ("x", x)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def check_scripted(encoder, lengths, width=8):
    x, offsets = draw(lengths, width)
    with torch.no_grad():
        assert_close(torch.jit.script(encoder)(x, offsets), encoder(x, offsets), rtol=1e-12, atol=1e-12)


class Recurrent(nn.Module):
    """Prefill, then a step: what an exported server runs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, x_t: torch.Tensor):
        hidden, state = self.encoder.prefill(x, offsets)
        out, state = self.encoder.step(x_t, state)
        return hidden, out, state


def check_scripted_recurrence(encoder, lengths, width=8):
    x, offsets = draw(lengths, width)
    x_t, _ = draw([len(lengths)], width, seed=2)
    with torch.no_grad():
        wrapped = Recurrent(encoder)
        hidden, out, state = wrapped(x, offsets, x_t)
        scripted = torch.jit.script(wrapped)(x, offsets, x_t)
        assert_close(scripted[0], hidden, rtol=1e-12, atol=1e-12)
        assert_close(scripted[1], out, rtol=1e-12, atol=1e-12)
        assert_close(tuple(scripted[2]), tuple(state), rtol=1e-12, atol=1e-12)


def check_long(encoder, length, width):
    with torch.no_grad():
        x, offsets = draw([length, 1], width, torch.float32)
        hidden = encoder(x, offsets)
    assert hidden.shape == x.shape
    assert hidden.isfinite().all()


def linear(layer, x):
    return layer.weight @ x + layer.bias


def elu(x):
    return torch.where(x > 0, x, x.exp() - 1)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x):
    return x / (1 + (-x).exp())


def layer_norm(layer, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias
