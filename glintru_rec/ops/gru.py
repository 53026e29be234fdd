"""Ragged GRU scan: the recurrence of ``torch.nn.GRU`` (no bias) over sequences of any length.

    r_t = σ(g_r + W_r h_{t-1})      z_t = σ(g_z + W_z h_{t-1})      n_t = tanh(g_n + r_t ⊗ W_n h_{t-1})
    h_t = (1 - z_t) ⊗ n_t + z_t ⊗ h_{t-1}

Shapes: T items, B sequences, D hidden width.
"""

import torch
from torch import Tensor

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


def ragged_gru(gates: Tensor, weight: Tensor, offsets: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a GRU over a ragged batch.

    Sequences never see each other: running a batch equals running its sequences one by one.

    Args:
        gates: input-to-hidden products for reset, update and new gate, ``[T, 3*D]``.
        weight: hidden-to-hidden weights, gates in the same order (``torch.nn.GRU.weight_hh_l0``), ``[3*D, D]``.
        offsets: where each sequence starts in ``gates``, int64 ``[B + 1]``, from 0 to T.
        initial: hidden state before the first item, ``[B, D]``; zeros when absent.

    Returns:
        The hidden state after every item, ``[T, D]``, and after each sequence's last item, ``[B, D]`` (an empty
        sequence gives back its initial state).
    """
    if initial is None:
        initial = gates.new_zeros(offsets.numel() - 1, weight.size(1))
    layout = time_major(offsets, gates.size(0))
    if torch.jit.is_scripting():
        hidden, last = _infer(gates, weight, initial, layout)
        return hidden, last
    return _RaggedGRU.apply(gates, weight, initial, layout)


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


class _RaggedGRU(torch.autograd.Function):
    """The scan with a backward pass by hand.

    What a time step needs of the gates' derivatives does not depend on the incoming gradient, so it is computed for
    all steps at once before the backward loop; a step is left with one product, one matmul and two additions, and the
    weight's gradient is a single matmul over all items after the loop.
    """

    @staticmethod
    def forward(ctx, gates: Tensor, weight: Tensor, initial: Tensor, layout: TimeMajor):
        width = weight.size(1)
        gates = gates.index_select(0, layout.rows)
        first = initial.index_select(0, layout.ranking)
        weight_t = weight.t().contiguous()
        num_items = gates.size(0)
        products = gates.new_empty(num_items, 3 * width)  # W h_{t-1}; only the new gate's third is kept
        rz = gates.new_empty(num_items, 2 * width)
        new = gates.new_empty(num_items, width)
        hidden = gates.new_empty(num_items, width)
        previous = first
        start = 0
        for n in layout.alive:
            here = slice(start, start + n)
            previous = previous[:n]
            w, rz_t, new_t, g = products[here], rz[here], new[here], gates[here]
            torch.mm(previous, weight_t, out=w)
            torch.add(g[:, : 2 * width], w[:, : 2 * width], out=rz_t).sigmoid_()
            torch.addcmul(g[:, 2 * width :], rz_t[:, :width], w[:, 2 * width :], out=new_t).tanh_()
            previous = torch.lerp(new_t, previous, rz_t[:, width:], out=hidden[here])
            start += n
        ctx.save_for_backward(weight, first, products[:, 2 * width :], rz, new, hidden)
        ctx.layout = layout
        return hidden.index_select(0, layout.places), _last_states(hidden, first, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        weight, first, product, rz, new, hidden = ctx.saved_tensors
        layout: TimeMajor = ctx.layout
        width = weight.size(1)
        reset, update = rz[:, :width], rz[:, width:]
        previous = _previous_states(hidden, first, layout)
        by_new = (1 - update) * (1 - new * new)  # d h / d (argument of tanh)
        # d h_t / d (W h_{t-1}), gate by gate: [T, 3, D]
        slope = torch.stack(
            [by_new * product * reset * (1 - reset), (previous - new) * update * (1 - update), by_new * reset], 1
        )
        grad_hidden = grads[0].index_select(0, layout.rows)
        carried = grads[1].index_select(0, layout.ranking).clone()
        grad_products = torch.empty_like(slope)
        end = hidden.size(0)
        for n in reversed(layout.alive):
            here = slice(end - n, end)
            grad = grad_hidden[here]
            grad.add_(carried[:n])
            torch.mul(grad.unsqueeze(1), slope[here], out=grad_products[here])
            torch.mul(grad, update[here], out=carried[:n])
            carried[:n].addmm_(grad_products[here].view(n, 3 * width), weight)
            end -= n
        grad_weight = grad_products.view(-1, 3 * width).t() @ previous
        grad_gates = grad_products
        torch.mul(grad_hidden, by_new, out=grad_gates[:, 2])
        grad_initial = torch.empty_like(carried)
        grad_initial[layout.ranking] = carried
        return grad_gates.view(-1, 3 * width).index_select(0, layout.places), grad_weight, grad_initial, None


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
