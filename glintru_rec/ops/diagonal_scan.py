"""Ragged diagonal linear recurrence over complex numbers, in real arithmetic on (real, imaginary) pairs.

    h_n = λ ⊗ h_{n-1} + b_n,    λ, b, h complex,    h_0 given

A complex array is a real one with a dimension of two: index 0 holds real parts, index 1 imaginary parts. It exports and
compiles where complex dtypes often do not.

A loop over time steps, vectorised over the sequences that have that many. Cutting the sequences into chunks that are
scanned side by side was three times slower for a training batch, and won only where few sequences are very long.

Shapes: T items, B sequences, S complex features.
"""

import torch
from torch import Tensor

from glintru_rec.ops.implementation import triton_kernels, under_autocast
from glintru_rec.ops.time_major import TimeMajor, time_major


def scan_reference(inputs: Tensor, decay: Tensor, offsets: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The truth: one sequence after another, one item after another (see `diagonal_scan`)."""
    states, last = [], []
    for b in range(offsets.numel() - 1):
        re, im = initial[b]
        for n in range(int(offsets[b]), int(offsets[b + 1])):
            re, im = decay[0] * re - decay[1] * im + inputs[n, 0], decay[0] * im + decay[1] * re + inputs[n, 1]
            states.append(torch.stack([re, im]))
        last.append(torch.stack([re, im]))
    return torch.stack(states) if states else inputs, torch.stack(last) if last else initial


def diagonal_scan(
    inputs: Tensor, decay: Tensor, offsets: Tensor, initial: Tensor | None = None, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a ragged batch.

    Sequences never see each other: running a batch equals running its sequences one by one.

    Args:
        inputs: b, ``[T, 2, S]``.
        decay: λ, ``[2, S]``; states stay bounded for ``|λ| < 1``.
        offsets: where each sequence starts in ``inputs``, int64 ``[B + 1]``, from 0 to T.
        initial: state before the first item, ``[B, 2, S]``; zeros when absent.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`).

    Returns:
        The state after every item, ``[T, 2, S]``, and after each sequence's last item, ``[B, 2, S]`` (an empty
        sequence gives back its initial state).

    Raises:
        InputError: the implementation is not to be had.
    """
    if initial is None:
        initial = inputs.new_zeros(offsets.numel() - 1, 2, inputs.size(2))
    if torch.jit.is_scripting():
        return _scan(inputs, decay, initial, offsets, time_major(offsets, inputs.size(0)))
    inputs, decay, initial = inputs.contiguous(), decay.contiguous(), initial.contiguous()
    states, last = _forward(inputs, decay, initial, offsets, implementation)
    return states, last


def diagonal_step(inputs: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """Take in one item of each sequence: ``λ ⊗ state + inputs``, all but ``decay`` of shape ``[B, 2, S]``."""
    turned = torch.stack([-state[:, 1], state[:, 0]], dim=1)  # i · state
    return inputs + decay[0] * state + decay[1] * turned


def _scan(inputs: Tensor, decay: Tensor, initial: Tensor, offsets: Tensor, layout: TimeMajor) -> tuple[Tensor, Tensor]:
    """Forward pass, see `diagonal_scan`."""
    states = inputs.index_select(0, layout.rows)  # a copy, turned into the states step by step
    previous = initial.index_select(0, layout.ranking)
    start = 0
    for n in layout.alive:
        h = states[start : start + n]
        h.addcmul_(previous[:n], decay[0])
        h[:, 0].addcmul_(previous[:n, 1], decay[1], value=-1)
        h[:, 1].addcmul_(previous[:n, 0], decay[1])
        previous = h
        start += n
    filled, ends = _ends(offsets, layout)
    last = initial.index_copy(0, filled, states.index_select(0, ends))
    return states.index_select(0, layout.places), last


def _ends(offsets: Tensor, layout: TimeMajor) -> tuple[Tensor, Tensor]:
    """Give the sequences that have items, and the time-major place of each one's last item."""
    filled = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
    return filled, layout.places[offsets[1:][filled] - 1]


@torch.library.custom_op("glintru_rec::scan_forward", mutates_args=())
def _forward(inputs: Tensor, decay: Tensor, initial: Tensor, offsets: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("scan", implementation, inputs)
    if kernels is not None:
        return kernels.forward(inputs, decay, initial, offsets)
    return _scan(inputs, decay, initial, offsets, time_major(offsets, inputs.size(0)))


@torch.library.custom_op("glintru_rec::scan_backward", mutates_args=())
def _backward(
    grad_states: Tensor,
    grad_last: Tensor,
    decay: Tensor,
    initial: Tensor,
    offsets: Tensor,
    states: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same recurrence from the end, with the conjugate of λ.

    With g_n the gradient of h_n through everything after it: g_n = ∂_n + λ̄ ⊗ g_{n+1};  that of b_n is g_n, that of
    h_0 is λ̄ ⊗ g_1, and that of λ is Σ_n g_n ⊗ h̄_{n-1}, summed within each sequence before across the batch.
    """
    kernels = triton_kernels("scan", implementation, states)
    if kernels is not None:
        return kernels.backward(grad_states, grad_last, decay, initial, offsets, states)
    layout = time_major(offsets, states.size(0))
    grad = grad_states.index_select(0, layout.rows)
    states = states.index_select(0, layout.rows)
    filled, ends = _ends(offsets, layout)
    grad.index_add_(0, ends, grad_last[filled])
    first = initial.index_select(0, layout.ranking)
    carried = grad_last.index_select(0, layout.ranking)
    along = torch.zeros_like(first)  # Σ_n g_n ⊗ h_{n-1}, part by part: its sum is the gradient of Re λ
    across = torch.zeros_like(first[:, 0])  # that of Im λ
    end = grad.size(0)
    for t in range(len(layout.alive) - 1, -1, -1):
        n = layout.alive[t]
        g = grad[end - n : end]
        end -= n
        if t > 0:
            start = end - layout.alive[t - 1]
            previous, g_before = states[start : start + n], grad[start : start + n]
        else:
            previous, g_before = first[:n], carried[:n].zero_()
        along[:n].addcmul_(g, previous)
        across[:n].addcmul_(g[:, 1], previous[:, 0]).addcmul_(g[:, 0], previous[:, 1], value=-1)
        g_before.addcmul_(g, decay[0])
        g_before[:, 0].addcmul_(g[:, 1], decay[1])
        g_before[:, 1].addcmul_(g[:, 0], decay[1], value=-1)
    grad_initial = torch.empty_like(carried)
    grad_initial[layout.ranking] = carried
    grad_decay = torch.stack([along.sum((0, 1)), across.sum(0)])
    return grad.index_select(0, layout.places), grad_decay, grad_initial


@_forward.register_fake
def _(inputs, decay, initial, offsets, implementation):
    return torch.empty_like(inputs), torch.empty_like(initial)


@_backward.register_fake
def _(grad_states, grad_last, decay, initial, offsets, states, implementation):
    return torch.empty_like(states), torch.empty_like(decay), torch.empty_like(initial)


def _setup(ctx, inputs, output) -> None:
    _, decay, initial, offsets, ctx.implementation = inputs
    ctx.save_for_backward(decay, initial, offsets, output[0])


def _gradients(ctx, grad_states: Tensor, grad_last: Tensor):
    grads = _backward(grad_states.contiguous(), grad_last.contiguous(), *ctx.saved_tensors, ctx.implementation)
    return (*grads, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
under_autocast(_forward, torch.float32, torch.float32)  # a |λ| of .99 would be .988 in bf16
