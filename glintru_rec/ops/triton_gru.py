"""Ragged GRU scan on a GPU: the kernels of `glintru_rec.ops.gru`, which has the equations.

A program takes a tile of sequences of about the same length and walks all their time steps, the state in registers, in
fp32. Where the recurrent weights fit on chip they are loaded once, before the first step (*resident*); wider ones are
read again at every step, from the L2 cache, in slices (*streamed*). The backward pass walks ``∂h_{t-1} = z ⊗ ∂h_t + Wᵀ ∂``
only; the weight's gradient is a matmul over all items after it.

Shapes: T items, B sequences, D hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.ops.triton_common import (
    block,
    factors,
    fits,
    load_matrix,
    load_rows,
    longest_first,
    product,
    refuse,
    store_rows,
)

SEQUENCES = 16  # of a tile: the fewest rows of a tensor core's product
SLICE = 16  # columns of the state that meet their weights at one time, where these are streamed
RESIDENT_BYTES = 112 << 10  # of the three weights: half of what an SM has of registers, or of shared memory
WIDEST = 256


def takes(weight: Tensor) -> bool:
    """Whether the kernels take hidden-to-hidden weights ``[3*D, D]`` of such dtype and width."""
    return fits(weight, weight.size(1), WIDEST)


def forward(gates: Tensor, weight: Tensor, initial: Tensor, offsets: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run a GRU over a ragged batch. All tensors are contiguous and of one dtype.

    Args:
        gates: input-to-hidden products, ``[T, 3*D]``.
        weight: hidden-to-hidden weights, ``[3*D, D]``.
        initial: hidden state before the first item, ``[B, D]``.
        offsets: int64 ``[B + 1]``, from 0 to T.
        save: keep what `backward` needs.

    Returns:
        The hidden state after every item, ``[T, D]``, after each sequence's last one, ``[B, D]``, and r, z, n and W_n h_{t-1}
        of every item, ``[T, 4*D]`` (``[0, 4*D]`` where they are not kept).

    Raises:
        InputError: a dtype or a width that the kernels do not take.
    """
    width, num_sequences = weight.size(1), initial.size(0)
    refuse("ragged_gru", weight, width, WIDEST)
    hidden = gates.new_empty(gates.size(0), width)
    last = torch.empty_like(initial)
    saved = gates.new_empty(gates.size(0) if save else 0, 4 * width)
    tiles = triton.cdiv(num_sequences, SEQUENCES)
    if tiles > 0:
        state = torch.empty(tiles * SEQUENCES, width, dtype=torch.float32, device=gates.device)
        arguments = (gates, weight, initial, offsets, longest_first(offsets), hidden, last, saved, state, num_sequences)
        _forward[(tiles,)](*arguments, SAVE=save, **_shape(weight))
    return hidden, last, saved


def backward(
    grad_hidden: Tensor, grad_last: Tensor, weight: Tensor, initial: Tensor, offsets: Tensor, hidden: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_hidden: gradient of the hidden states, ``[T, D]``.
        grad_last: gradient of the last states, ``[B, D]``.
        weight: as given to `forward`.
        initial: likewise.
        offsets: likewise.
        hidden: what it gave, ``[T, D]``.
        saved: likewise, ``[T, 4*D]``.

    Returns:
        Gradients of ``gates``, ``weight`` and ``initial``.
    """
    num_items, width = hidden.shape
    if num_items == 0:
        return hidden.new_empty(0, 3 * width), torch.zeros_like(weight), grad_last.clone()
    previous = torch.empty_like(hidden)  # h_{t-1} of every item, as the weight's gradient wants it
    grad_gates = hidden.new_empty(num_items, 3 * width)
    grad_product = torch.empty_like(hidden)  # of W_n h_{t-1}; those of the other two are the gates'
    grad_initial = torch.empty_like(initial)
    tiles = triton.cdiv(initial.size(0), SEQUENCES)
    ranking = longest_first(offsets)
    incoming = (grad_hidden, grad_last, saved, hidden, initial, weight, offsets, ranking)
    _backward[(tiles,)](*incoming, previous, grad_gates, grad_product, grad_initial, initial.size(0), **_shape(weight))
    reset_update, new = grad_gates[:, : 2 * width].t() @ previous, grad_product.t() @ previous
    return grad_gates, torch.cat([reset_update, new]), grad_initial


def _shape(weight: Tensor) -> dict:
    """Choose the tiles, and where the weights live."""
    columns = block(weight.size(1))
    return {
        "WIDTH": weight.size(1),
        "SEQUENCES": SEQUENCES,
        "COLUMNS": columns,
        "SLICE": SLICE,
        "RESIDENT": 3 * columns**2 * weight.element_size() <= RESIDENT_BYTES,
        "FACTORS": factors(weight.dtype),
        "num_warps": {16: 4, 32: 4, 256: 16}.get(columns, 8),
        "num_stages": 1,
    }


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _tile(offsets, ranking, num_sequences, WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, COLUMNS: tl.constexpr):
    """Give the program's sequences, where each starts, its length (0 where there is none), and the columns of a state."""
    place = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    exists = place < num_sequences
    sequence = tl.load(ranking + place, mask=exists, other=0)
    start = tl.load(offsets + sequence, mask=exists, other=0)
    end = tl.load(offsets + sequence + 1, mask=exists, other=0)
    columns = tl.arange(0, COLUMNS)
    inside = (columns < WIDTH)[None, :]
    return place, sequence, start, end - start, columns, inside, exists[:, None] & inside


@triton.jit
def _weights(weight, gate: tl.constexpr, rows, columns, WIDTH: tl.constexpr):
    """Read one gate's weights at given outputs (rows) and inputs (columns); the two index arrays broadcast to the tile."""
    return load_matrix(weight + gate * WIDTH * WIDTH, rows, columns, WIDTH, WIDTH)


@triton.jit
def _forward(
    gates,
    weight,
    initial,
    offsets,
    ranking,
    hidden,
    last,
    saved,
    state,
    num_sequences,
    SAVE: tl.constexpr,
    WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    RESIDENT: tl.constexpr,
    FACTORS: tl.constexpr,
):
    tile = _tile(offsets, ranking, num_sequences, WIDTH, SEQUENCES, COLUMNS)
    place, sequence, start, length, columns, inside, mask = tile
    h = load_rows(initial, sequence, columns, mask, WIDTH)
    if RESIDENT:
        w_r = _weights(weight, 0, columns[None, :], columns[:, None], WIDTH).to(FACTORS)
        w_z = _weights(weight, 1, columns[None, :], columns[:, None], WIDTH).to(FACTORS)
        w_n = _weights(weight, 2, columns[None, :], columns[:, None], WIDTH).to(FACTORS)
    else:
        own = state + place[:, None] * WIDTH
        tl.store(own + columns[None, :], h, mask=inside)
        tl.debug_barrier()
    alive = (length > 0)[:, None] & inside
    g_r = load_rows(gates, start, columns, alive, 3 * WIDTH)
    g_z = load_rows(gates + WIDTH, start, columns, alive, 3 * WIDTH)
    g_n = load_rows(gates + 2 * WIDTH, start, columns, alive, 3 * WIDTH)
    for t in range(tl.max(length, 0)):
        # The next step's gates travel while this step computes.
        next_alive = (t + 1 < length)[:, None] & inside
        next_r = load_rows(gates, start + t + 1, columns, next_alive, 3 * WIDTH)
        next_z = load_rows(gates + WIDTH, start + t + 1, columns, next_alive, 3 * WIDTH)
        next_n = load_rows(gates + 2 * WIDTH, start + t + 1, columns, next_alive, 3 * WIDTH)
        if RESIDENT:
            p_r, p_z, p_n = product(h, w_r, FACTORS), product(h, w_z, FACTORS), product(h, w_n, FACTORS)
        else:
            p_r = tl.zeros([SEQUENCES, COLUMNS], tl.float32)
            p_z, p_n = p_r, p_r
            for first in range(0, WIDTH, SLICE):
                inputs = first + tl.arange(0, SLICE)
                h_slice = tl.load(own + inputs[None, :], mask=(inputs < WIDTH)[None, :], other=0.0)
                p_r += product(h_slice, _weights(weight, 0, columns[None, :], inputs[:, None], WIDTH), FACTORS)
                p_z += product(h_slice, _weights(weight, 1, columns[None, :], inputs[:, None], WIDTH), FACTORS)
                p_n += product(h_slice, _weights(weight, 2, columns[None, :], inputs[:, None], WIDTH), FACTORS)
            tl.debug_barrier()  # all have read the state before anyone changes it
        r, z = tl.sigmoid(g_r + p_r), tl.sigmoid(g_z + p_z)
        new = _tanh(g_n + r * p_n)
        h = tl.where(alive, new + z * (h - new), h)
        store_rows(hidden, start + t, columns, h, alive, WIDTH)
        if SAVE:
            store_rows(saved, start + t, columns, r, alive, 4 * WIDTH)
            store_rows(saved + WIDTH, start + t, columns, z, alive, 4 * WIDTH)
            store_rows(saved + 2 * WIDTH, start + t, columns, new, alive, 4 * WIDTH)
            store_rows(saved + 3 * WIDTH, start + t, columns, p_n, alive, 4 * WIDTH)
        if not RESIDENT:
            tl.store(own + columns[None, :], h, mask=inside)
            tl.debug_barrier()
        g_r, g_z, g_n, alive = next_r, next_z, next_n, next_alive
    store_rows(last, sequence, columns, h, mask, WIDTH)


@triton.jit
def _slopes(saved, hidden, initial, grad_hidden, sequence, start, row, columns, alive, WIDTH: tl.constexpr):
    """Give a step's own gradient, z, r, and the slopes of h_t in the arguments of σ, σ and tanh, and h_{t-1}."""
    dh = load_rows(grad_hidden, row, columns, alive, WIDTH)
    h = load_rows(hidden, row - 1, columns, alive & (row > start)[:, None], WIDTH)
    h += load_rows(initial, sequence, columns, alive & (row == start)[:, None], WIDTH)
    r = load_rows(saved, row, columns, alive, 4 * WIDTH)
    z = load_rows(saved + WIDTH, row, columns, alive, 4 * WIDTH)
    new = load_rows(saved + 2 * WIDTH, row, columns, alive, 4 * WIDTH)
    p_n = load_rows(saved + 3 * WIDTH, row, columns, alive, 4 * WIDTH)
    by_n = (1 - z) * (1 - new * new)
    return dh, z, r, by_n * p_n * r * (1 - r), (h - new) * z * (1 - z), by_n, h


@triton.jit
def _backward(
    grad_hidden,
    grad_last,
    saved,
    hidden,
    initial,
    weight,
    offsets,
    ranking,
    previous,
    grad_gates,
    grad_product,
    grad_initial,
    num_sequences,
    WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    RESIDENT: tl.constexpr,
    FACTORS: tl.constexpr,
):
    _, sequence, start, length, columns, inside, mask = _tile(offsets, ranking, num_sequences, WIDTH, SEQUENCES, COLUMNS)
    grad = load_rows(grad_last, sequence, columns, mask, WIDTH)
    if RESIDENT:
        w_r = _weights(weight, 0, columns[:, None], columns[None, :], WIDTH).to(FACTORS)
        w_z = _weights(weight, 1, columns[:, None], columns[None, :], WIDTH).to(FACTORS)
        w_n = _weights(weight, 2, columns[:, None], columns[None, :], WIDTH).to(FACTORS)
    row, alive = start + length - 1, (length > 0)[:, None] & inside  # every sequence from its own end
    dh, z, r, by_r, by_z, by_n, h = _slopes(saved, hidden, initial, grad_hidden, sequence, start, row, columns, alive, WIDTH)
    store_rows(previous, row, columns, h, alive, WIDTH)
    for back in range(tl.max(length, 0)):
        # What the step before needs does not depend on this one's gradient: it is read and computed meanwhile.
        earlier = (back + 1 < length)[:, None] & inside
        earlier_dh, earlier_z, earlier_r, earlier_by_r, earlier_by_z, earlier_by_n, earlier_h = _slopes(
            saved, hidden, initial, grad_hidden, sequence, start, row - 1, columns, earlier, WIDTH
        )
        dh += grad
        d_r, d_z, d_n = dh * by_r, dh * by_z, dh * by_n
        d_p = d_n * r
        store_rows(grad_gates, row, columns, d_r, alive, 3 * WIDTH)
        store_rows(grad_gates + WIDTH, row, columns, d_z, alive, 3 * WIDTH)
        store_rows(grad_gates + 2 * WIDTH, row, columns, d_n, alive, 3 * WIDTH)
        store_rows(grad_product, row, columns, d_p, alive, WIDTH)
        if RESIDENT:
            through = product(d_r, w_r, FACTORS) + product(d_z, w_z, FACTORS) + product(d_p, w_n, FACTORS)
        else:
            tl.debug_barrier()  # the slices read what other threads have just written
            through = tl.zeros([SEQUENCES, COLUMNS], tl.float32)
            for first in range(0, WIDTH, SLICE):
                outputs = first + tl.arange(0, SLICE)
                known = (back < length)[:, None] & (outputs < WIDTH)[None, :]
                d_r_slice = load_rows(grad_gates, row, outputs, known, 3 * WIDTH)
                d_z_slice = load_rows(grad_gates + WIDTH, row, outputs, known, 3 * WIDTH)
                d_p_slice = load_rows(grad_product, row, outputs, known, WIDTH)
                through += product(d_r_slice, _weights(weight, 0, outputs[:, None], columns[None, :], WIDTH), FACTORS)
                through += product(d_z_slice, _weights(weight, 1, outputs[:, None], columns[None, :], WIDTH), FACTORS)
                through += product(d_p_slice, _weights(weight, 2, outputs[:, None], columns[None, :], WIDTH), FACTORS)
        grad = tl.where(alive, dh * z + through, grad)
        store_rows(previous, row - 1, columns, earlier_h, earlier, WIDTH)  # here, where nobody waits for what was read
        dh, z, r, by_r, by_z, by_n = earlier_dh, earlier_z, earlier_r, earlier_by_r, earlier_by_z, earlier_by_n
        row, alive = row - 1, earlier
    store_rows(grad_initial, sequence, columns, grad, mask, WIDTH)
