"""The step law: a state carried on event by event gives what the whole history gives."""

import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.jagged import offsets_from_lengths
from tests.encoder_laws import check_ragged_prefill, check_scripted_recurrence, check_step_law, make

VARIANTS = [
    {},
    {"num_blocks": 2},
    {"gated_mlp": False},
    {"kernel_size": 1},
    {"kernel_size": 5},
    {"embedding_norm": False},
    {"gru_expert": False},
    {"gru_expert": False, "gated_mlp": False, "num_blocks": 2},
    {"attention_expert": False},
    {"attention_expert": False, "kernel_size": 1},
    {"selective_gate": False},
    {"selective_gate": False, "kernel_size": 1, "num_blocks": 2},
    {"selective_gate": False, "attention_expert": False, "kernel_size": 1},
]


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
    without_state = encoder(x[index], offsets_from_lengths(torch.full((3,), prefix)))
    assert ((hidden - without_state).abs() <= bound).all()  # a state asked for, attention sums in another order
    for n in range(prefix, 20):
        out, state = encoder.step(x[offsets[:-1] + n], state)
        assert (out - whole[offsets[:-1] + n]).abs().max() <= bound


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_step_law(variant):
    """Biases, norms and mixing weights away from where they start; states of one shape on every way to them."""
    check_step_law(make(GlintRU, **variant), length=7, dtype=torch.float64, tolerance=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ragged_prefill_gives_the_states_of_each_alone(variant):
    check_ragged_prefill(make(GlintRU, **variant), [3, 0, 40, 1])


def test_state_before_the_first_item_and_its_size():
    encoder = GlintRU(32, num_heads=4, kernel_size=3, num_blocks=2).eval()
    start = encoder.init_state(3)
    _, none = encoder.prefill(torch.empty(0, 32), torch.zeros(4, dtype=torch.int64))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(start, none))
    x, offsets = histories([5000], 32, torch.float32)
    _, long = encoder.prefill(x, offsets)
    assert [tensor[0].numel() for tensor in long] == [tensor[0].numel() for tensor in start]
    assert sum(tensor[0].numel() for tensor in long) == 2 * (2 * 32 + 32 + 2 * 32 + 32 * 8)  # O(D k + D d) a block


def test_an_expert_that_is_left_out_keeps_nothing():
    shapes = {
        "gru_expert": [(3, 2, 0, 32), (3, 2, 0), (3, 2, 0, 32), (3, 2, 4, 8, 8)],
        "attention_expert": [(3, 2, 2, 32), (3, 2, 32), (3, 2, 2, 32), (3, 2, 0, 8, 8)],
    }
    for option, expected in shapes.items():
        encoder = GlintRU(32, num_heads=4, kernel_size=3, num_blocks=2, **{option: False})
        assert [tuple(part.shape) for part in encoder.init_state(3)] == expected
    assert GlintRU(32, gru_expert=False).state_size == 32 * 8
    assert GlintRU(32, attention_expert=False, kernel_size=1).state_size == 32


def test_bidirectional_has_no_recurrent_form():
    encoder = GlintRU(32, causal=False)
    with pytest.raises(ValueError, match="no recurrent form"):
        encoder.prefill(*histories([3], 32, torch.float32))


def test_gradients_flow_through_prefill():
    encoder = GlintRU(8, num_heads=2).double().eval()
    x, offsets = histories([5, 2], 8)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(encoder.prefill(x, offsets)[1]), (x,))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_scripted_equals_eager(variant):
    check_scripted_recurrence(make(GlintRU, **variant), [3, 0, 9])
