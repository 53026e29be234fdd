"""The step law: a state carried on event by event gives what the whole history gives."""

import pytest
import torch
from torch import nn

from glintru_rec import GlintRU
from glintru_rec.jagged import offsets_from_lengths

VARIANTS = [{}, {"num_blocks": 2}, {"gated_mlp": False}, {"kernel_size": 1}, {"kernel_size": 5}, {"embedding_norm": False}]


def histories(lengths, width, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(sum(lengths), width, dtype=dtype), offsets_from_lengths(torch.tensor(lengths))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 17])
def test_prefill_and_steps_equal_forward(variant, dtype, bound, prefix):
    torch.manual_seed(1)
    encoder = GlintRU(32, **variant).to(dtype).eval()
    x, offsets = histories([20, 20, 20], 32, dtype)
    whole = encoder(x, offsets)
    index = torch.cat([torch.arange(start, start + prefix) for start in offsets[:-1].tolist()])
    hidden, state = encoder.prefill(x[index], offsets_from_lengths(torch.full((3,), prefix)))
    assert torch.equal(hidden, encoder(x[index], offsets_from_lengths(torch.full((3,), prefix))))
    for n in range(prefix, 20):
        out, state = encoder.step(x[offsets[:-1] + n], state)
        assert (out - whole[offsets[:-1] + n]).abs().max() <= bound


def test_ragged_prefill_gives_the_states_of_each_alone():
    encoder = GlintRU(32, num_blocks=2).double().eval()
    x, offsets = histories([3, 0, 40, 1], 32)
    _, together = encoder.prefill(x, offsets)
    for b in range(4):
        part = x[offsets[b] : offsets[b + 1]]
        _, alone = encoder.prefill(part, torch.tensor([0, part.size(0)]))
        for ours, theirs in zip(alone, together):
            torch.testing.assert_close(ours[0], theirs[b], rtol=0, atol=1e-12)


def test_state_before_the_first_item_and_its_size():
    encoder = GlintRU(32, num_heads=4, kernel_size=3, num_blocks=2).eval()
    start = encoder.init_state(3)
    _, none = encoder.prefill(torch.empty(0, 32), torch.zeros(4, dtype=torch.int64))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(start, none))
    x, offsets = histories([5000], 32, torch.float32)
    _, long = encoder.prefill(x, offsets)
    assert [tensor[0].numel() for tensor in long] == [tensor[0].numel() for tensor in start]
    assert sum(tensor[0].numel() for tensor in long) == 2 * (2 * 32 + 32 + 2 * 32 + 32 * 8)  # O(D k + D d) a block


def test_bidirectional_has_no_recurrent_form():
    encoder = GlintRU(32, causal=False)
    with pytest.raises(ValueError, match="no recurrent form"):
        encoder.prefill(*histories([3], 32, torch.float32))


def test_gradients_flow_through_prefill():
    encoder = GlintRU(8, num_heads=2).double().eval()
    x, offsets = histories([5, 2], 8)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(encoder.prefill(x, offsets)[1]), (x,))


class Follow(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        _, state = self.encoder.prefill(x, offsets)
        return self.encoder.step(x[offsets[1:] - 1], state)[0]


def test_scripted_equals_eager():
    follow = Follow(GlintRU(16, num_blocks=2).double().eval())
    x, offsets = histories([3, 9], 16)
    torch.testing.assert_close(torch.jit.script(follow)(x, offsets), follow(x, offsets), rtol=0, atol=1e-12)
