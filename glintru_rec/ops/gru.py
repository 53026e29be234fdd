"""Ragged GRU scan: the recurrence of ``torch.nn.GRU`` (no bias) over sequences of any length.

    r_t = σ(g_r + W_r h_{t-1})      z_t = σ(g_z + W_z h_{t-1})      n_t = tanh(g_n + r_t ⊗ W_n h_{t-1})
    h_t = (1 - z_t) ⊗ n_t + z_t ⊗ h_{t-1}

Shapes: T items, B sequences, D hidden width.
"""

import torch
from torch import Tensor

from glintru_rec.ops.implementation import triton_kernels, under_autocast
from glintru_rec.ops.time_major import TimeMajor, time_major


def gru_reference(gates: Tensor, weight: Tensor, offsets: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The truth: one sequence after another, one item after another (see `ragged_gru`)."""
    hidden, last = [], []
    for b in range(offsets.numel() - 1):
        h = initial[b]
        for t in range(int(offsets[b]), int(offsets[b + 1])):
            g_r, g_z, g_n = gates[t].chunk(3)
            w_r, w_z, w_n = (weight @ h).chunk(3)
            r, z = torch.sigmoid(g_r + w_r), torch.sigmoid(g_z + w_z)
            h = (1 - z) * torch.tanh(g_n + r * w_n) + z * h
            hidden.append(h)
        last.append(h)
    return torch.stack(hidden) if hidden else gates[:, : weight.size(1)], torch.stack(last) if last else initial


def ragged_gru(
    gates: Tensor, weight: Tensor, offsets: Tensor, initial: Tensor | None = None, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run a GRU over a ragged batch.

    Sequences never see each other: running a batch equals running its sequences one by one.

    Args:
        gates: input-to-hidden products for reset, update and new gate, ``[T, 3*D]``.
        weight: hidden-to-hidden weights, gates in the same order (``torch.nn.GRU.weight_hh_l0``), ``[3*D, D]``.
        offsets: where each sequence starts in ``gates``, int64 ``[B + 1]``, from 0 to T.
        initial: hidden state before the first item, ``[B, D]``; zeros when absent.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`).

    Returns:
        The hidden state after every item, ``[T, D]``, and after each sequence's last item, ``[B, D]`` (an empty
        sequence gives back its initial state).

    Raises:
        InputError: the implementation is not to be had.
    """
    if initial is None:
        initial = gates.new_zeros(offsets.numel() - 1, weight.size(1))
    if torch.jit.is_scripting():
        hidden, last = _infer(gates, weight, initial, time_major(offsets, gates.size(0)))
        return hidden, last
    save = torch.is_grad_enabled() and (gates.requires_grad or weight.requires_grad or initial.requires_grad)
    gates, weight, initial = gates.contiguous(), weight.contiguous(), initial.contiguous()
    hidden, last, _ = _forward(gates, weight, initial, offsets, save, implementation)
    return hidden, last


def gru_step(gates: Tensor, weight_t: Tensor, hidden: Tensor) -> Tensor:
    """Take one time step of `ragged_gru`.

    Args:
        gates: input-to-hidden products, ``[B, 3*D]``.
        weight_t: hidden-to-hidden weights, transposed, ``[D, 3*D]``.
        hidden: state before, ``[B, D]``.

    Returns:
        State after, ``[B, D]``.
    """
    width = hidden.size(1)
    w = torch.mm(hidden, weight_t)
    rz = torch.sigmoid(gates[:, : 2 * width] + w[:, : 2 * width])
    new = torch.tanh(torch.addcmul(gates[:, 2 * width :], rz[:, :width], w[:, 2 * width :]))
    return torch.lerp(new, hidden, rz[:, width:])


def _infer(gates: Tensor, weight: Tensor, initial: Tensor, layout: TimeMajor) -> tuple[Tensor, Tensor]:
    """Forward pass alone: what an exported model runs."""
    gates = gates.index_select(0, layout.rows)
    weight_t = weight.t().contiguous()
    last = initial.index_select(0, layout.ranking)
    hidden = gates.new_empty(gates.size(0), weight.size(1))
    start = 0
    for n in layout.alive:
        h = gru_step(gates[start : start + n], weight_t, last[:n])
        last[:n] = h
        hidden[start : start + n] = h
        start += n
    unranked = torch.empty_like(last)
    unranked[layout.ranking] = last
    return hidden.index_select(0, layout.places), unranked


# The backward pass is by hand. What a time step needs of the gates' derivatives does not depend on the incoming gradient, so it
# is computed for all steps at once before the backward loop; a step is left with one product, one matmul and two additions,
# and the weight's gradient is a single matmul over all items after the loop.


@torch.library.custom_op("glintru_rec::gru_forward", mutates_args=())
def _forward(
    gates: Tensor, weight: Tensor, initial: Tensor, offsets: Tensor, save: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = triton_kernels("gru", implementation, weight)
    if kernels is not None:
        return kernels.forward(gates, weight, initial, offsets, save)
    layout = time_major(offsets, gates.size(0))
    if not save:
        hidden, last = _infer(gates, weight, initial, layout)
        return hidden, last, gates.new_empty(0, 4 * weight.size(1))
    return _train(gates, weight, initial, layout)


def _train(gates: Tensor, weight: Tensor, initial: Tensor, layout: TimeMajor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass that keeps r, z, W_n h_{t-1} and n of every item, in time-major order."""
    width = weight.size(1)
    gates = gates.index_select(0, layout.rows)
    first = initial.index_select(0, layout.ranking)
    weight_t = weight.t().contiguous()
    saved = gates.new_empty(gates.size(0), 4 * width)
    saved[:, : 2 * width] = gates[:, : 2 * width]
    saved[:, 2 * width : 3 * width] = 0
    rzw, rz, reset, update, product, new = (
        saved[:, begin * width : end * width].split(layout.alive)
        for begin, end in ((0, 3), (0, 2), (0, 1), (1, 2), (2, 3), (3, 4))
    )
    hidden = torch.empty_like(gates[:, :width], memory_format=torch.contiguous_format)
    previous = first
    for t, (h, gate) in enumerate(zip(hidden.split(layout.alive), gates[:, 2 * width :].split(layout.alive))):
        previous = previous[: h.size(0)]
        rzw[t].addmm_(previous, weight_t)
        rz[t].sigmoid_()
        torch.addcmul(gate, reset[t], product[t], out=new[t]).tanh_()
        previous = torch.lerp(new[t], previous, update[t], out=h)
    return hidden.index_select(0, layout.places), _last_states(hidden, first, layout), saved


@torch.library.custom_op("glintru_rec::gru_backward", mutates_args=())
def _backward(
    grad_hidden: Tensor,
    grad_last: Tensor,
    weight: Tensor,
    initial: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    saved: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = triton_kernels("gru", implementation, weight)
    if kernels is not None:
        return kernels.backward(grad_hidden, grad_last, weight, initial, offsets, hidden, saved)
    layout = time_major(offsets, hidden.size(0))
    width = weight.size(1)
    reset, update, product, new = saved.chunk(4, 1)
    previous = _previous_states(hidden.index_select(0, layout.rows), initial.index_select(0, layout.ranking), layout)
    by_new, slope = _slopes(reset, update, product, new, previous)
    grad_hidden = grad_hidden.index_select(0, layout.rows)
    carried = grad_last.index_select(0, layout.ranking)
    grad_products = slope
    steps = [x.split(layout.alive) for x in (grad_hidden, slope, slope.view(-1, 3 * width), update)]
    for grad, slope_t, flat, update_t in zip(*(reversed(step) for step in steps)):
        carry = carried[: grad.size(0)]
        grad.add_(carry)
        slope_t.mul_(grad.unsqueeze(1))
        torch.mul(grad, update_t, out=carry).addmm_(flat, weight)
    grad_weight = grad_products.view(-1, 3 * width).t() @ previous
    torch.mul(grad_hidden, by_new, out=grad_products[:, 2])
    grad_initial = torch.empty_like(carried)
    grad_initial[layout.ranking] = carried
    return grad_products.view(-1, 3 * width).index_select(0, layout.places), grad_weight, grad_initial


def _slopes(reset: Tensor, update: Tensor, product: Tensor, new: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Give d h / d (argument of tanh), ``[T, D]``, and d h_t / d (W h_{t-1}), gate by gate, ``[T, 3, D]``.

    A factor (1 - y) is x - x y in place, for fresh memory costs more than the arithmetic.
    """
    by_new = torch.mul(new, new).neg_().add_(1)
    by_new.addcmul_(by_new, update, value=-1)  # (1 - z) (1 - n²)
    slope = new.new_empty(new.size(0), 3, new.size(1))
    by_reset, by_update, by_product = slope.unbind(1)
    torch.mul(by_new, reset, out=by_product)
    torch.mul(by_product, product, out=by_reset)
    by_reset.addcmul_(by_reset, reset, value=-1)
    torch.sub(previous, new, out=by_update).mul_(update)
    by_update.addcmul_(by_update, update, value=-1)
    return by_new, slope


def _previous_states(hidden: Tensor, first: Tensor, layout: TimeMajor) -> Tensor:
    """State before every item, in time-major order: step t-1's states, cut to those alive at step t."""
    if not layout.alive:
        return hidden
    states, start = [first[: layout.alive[0]]], 0
    for n_before, n in zip(layout.alive, layout.alive[1:]):
        states.append(hidden[start : start + n])
        start += n_before
    return torch.cat(states)


def _last_states(hidden: Tensor, first: Tensor, layout: TimeMajor) -> Tensor:
    """State after each sequence's last item, in the order of the batch."""
    last = first.clone()
    start = 0
    for n in layout.alive:
        last[:n] = hidden[start : start + n]
        start += n
    unranked = torch.empty_like(last)
    unranked[layout.ranking] = last
    return unranked


@_forward.register_fake
def _(gates, weight, initial, offsets, save, implementation):
    width = weight.size(1)
    hidden, saved = gates.new_empty(gates.size(0), width), gates.new_empty(gates.size(0) if save else 0, 4 * width)
    return hidden, torch.empty_like(initial), saved


@_backward.register_fake
def _(grad_hidden, grad_last, weight, initial, offsets, hidden, saved, implementation):
    gates = hidden.new_empty(hidden.size(0), 3 * hidden.size(1))
    return gates, torch.empty_like(weight), torch.empty_like(initial)


def _setup(ctx, inputs, output) -> None:
    _, weight, initial, offsets, _, implementation = inputs
    hidden, _, saved = output
    ctx.save_for_backward(weight, initial, offsets, hidden, saved)
    ctx.implementation = implementation
    ctx.mark_non_differentiable(saved)


def _gradients(ctx, grad_hidden: Tensor, grad_last: Tensor, _):
    grads = _backward(grad_hidden.contiguous(), grad_last.contiguous(), *ctx.saved_tensors, ctx.implementation)
    return (*grads, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
under_autocast(_forward, torch.float32)
