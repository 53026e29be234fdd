"""Dense selective GRU on a GPU: the kernels of `glintru_rec.ops.selective_gru`, which has the equations.

Only the scan is a chain of steps, and its programs are few: `triton_gru` runs it as it is, with nothing added to a step. What
is before and after it are matmuls over all items, bound by bytes, so each side is one kernel whose intermediate results stay
on chip::

    before    u -> c -> gates, g            after     h, g -> Φ -> g ⊗ Φ -> Y

``after`` computes Φ again for each tap, which costs 2 (k - 1) D² operations more an item and saves writing and reading
g ⊗ Φ. The backward pass has a kernel for either side too; the weights' gradients are matmuls over all items after them.

Shapes: T items, B sequences, D width, k taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.jagged import positions
from glintru_rec.ops import triton_gru
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights
from glintru_rec.ops.triton_common import (
    block,
    factors,
    fits,
    load_bias,
    load_matrix,
    load_rows,
    product,
    refuse,
    store_rows,
    within,
)
from glintru_rec.ops.triton_conv import convolved, dense_input_gradient, dense_weight_gradient, items_after, shifted


def takes(u: Tensor) -> bool:
    """Whether the kernels take inputs ``[T, D]`` of such dtype and width."""
    return fits(u, u.size(1), triton_gru.WIDEST)


def forward(
    u: Tensor,
    weights: SelectiveGRUWeights,
    gate: SelectiveGate,
    initial: Tensor,
    offsets: Tensor,
    kept: Tensor | None,
    rate: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the dense selective GRU over a ragged batch. All tensors are contiguous and of one dtype.

    Args:
        u: ``[T, D]``.
        weights: of all layers but the gate.
        gate: of the gate.
        initial: the GRU's state before the first item, ``[B, D]``.
        offsets: int64 ``[B + 1]``, from 0 to T.
        kept: which numbers of the gate dropout keeps, bool ``[T, D]``; all when absent.
        rate: of dropout.
        save: keep what `backward` needs.

    Returns:
        Y ``[T, D]``, the GRU's state after each sequence's last item ``[B, D]``, and what is kept (of no items where
        nothing is): c ``[T, D]``, the gate after dropout ``[T, D]``, the GRU's states ``[T, D]``, what its scan keeps
        ``[T, 4*D]``.

    Raises:
        InputError: a dtype or a width that the kernels do not take.
    """
    num_items, width = u.shape
    refuse("selective_gru", u, width, triton_gru.WIDEST)
    position = positions(offsets, num_items)
    c = u.new_empty(num_items if save else 0, width)
    gates, g, out = u.new_empty(num_items, 3 * width), torch.empty_like(u), torch.empty_like(u)
    grid, shape = _shape(u, weights, gate)
    if num_items > 0:
        conv_in = weights.conv_in.permute(2, 1, 0).contiguous()
        dropping = {"scale": 1 / (1 - rate), "SAVE": save, "DROPPED": kept is not None}
        _before[grid](
            u, position, kept, conv_in, weights.conv_in_bias, weights.gates, *gate, c, gates, g, num_items, **dropping, **shape
        )
    hidden, last, scan = triton_gru.forward(gates, weights.recurrent, initial, offsets, save)
    if num_items > 0:
        conv_out = weights.conv_out.permute(2, 1, 0).contiguous()
        after = (hidden, g, position, weights.crossing, weights.crossing_bias, conv_out, weights.conv_out_bias)
        _after[grid](*after, out, num_items, **shape)
    return (out, last, c, g, hidden, scan) if save else (out, last, c, g[:0].clone(), hidden[:0].clone(), scan)


def backward(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    weights: SelectiveGRUWeights,
    gate: SelectiveGate,
    initial: Tensor,
    offsets: Tensor,
    kept: Tensor | None,
    rate: float,
    c: Tensor,
    g: Tensor,
    hidden: Tensor,
    scan: Tensor,
) -> tuple[Tensor, SelectiveGRUWeights, SelectiveGate, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_out: gradient of Y, ``[T, D]``.
        grad_last: gradient of the last states, ``[B, D]``.
        u: as given to `forward`.
        weights: likewise.
        gate: likewise.
        initial: likewise.
        offsets: likewise.
        kept: likewise.
        rate: likewise.
        c: as it gave.
        g: likewise.
        hidden: likewise.
        scan: likewise.

    Returns:
        Gradients of ``u``, ``weights``, ``gate`` and ``initial``.
    """
    num_items, inner = u.size(0), gate.down.size(0)
    position, later = positions(offsets, num_items), items_after(offsets, num_items)
    gated, grad_phi, grad_g, grad_hidden, grad_c = (torch.empty_like(u) for _ in range(5))
    silu, grad_a = u.new_empty(num_items, inner), u.new_empty(num_items, inner)
    grid, shape = _shape(u, weights, gate)
    if num_items > 0:
        conv_out = weights.conv_out.permute(2, 0, 1).contiguous()
        given = (grad_out, hidden, g, later, kept, weights.crossing, weights.crossing_bias, conv_out)
        dropping = {"scale": 1 / (1 - rate), "DROPPED": kept is not None}
        _after_backward[grid](*given, gated, grad_phi, grad_g, grad_hidden, num_items, **dropping, **shape)
    scanned = triton_gru.backward(grad_hidden, grad_last, weights.recurrent, initial, offsets, hidden, scan)
    grad_gates, grad_recurrent, grad_initial = scanned
    if num_items > 0:
        incoming = (grad_gates, grad_g, c, weights.gates, gate.down, gate.down_bias, gate.up)
        _before_backward[grid](*incoming, silu, grad_a, grad_c, num_items, **shape)
    grad_weights = SelectiveGRUWeights(
        conv_in=dense_weight_gradient(grad_c, u, weights.conv_in, position),
        conv_in_bias=grad_c.sum(0),
        gates=grad_gates.t() @ c,
        recurrent=grad_recurrent,
        crossing=grad_phi.t() @ hidden,
        crossing_bias=grad_phi.sum(0),
        conv_out=dense_weight_gradient(grad_out, gated, weights.conv_out, position),
        conv_out_bias=grad_out.sum(0),
    )
    grad_gate = SelectiveGate(grad_a.t() @ c, grad_a.sum(0), grad_g.t() @ silu, grad_g.sum(0))
    return dense_input_gradient(grad_c, weights.conv_in, later), grad_weights, grad_gate, grad_initial


def _shape(u: Tensor, weights: SelectiveGRUWeights, gate: SelectiveGate) -> tuple[tuple[int], dict]:
    """Choose the grid and the tiles: smaller ones in fp32 and for wide rows, so that nothing spills."""
    columns, wide = block(u.size(1)), u.dtype == torch.float32
    items = 32 if wide or columns > 128 else 64
    return (triton.cdiv(u.size(0), items),), {
        "TAPS": weights.conv_in.size(2),
        "WIDTH": u.size(1),
        "INNER": gate.down.size(0),
        "ITEMS": items,
        "COLUMNS": columns,
        "SLICE": 16 if wide else 32,  # columns of a tile that meet their weights at one time
        "FACTORS": factors(u.dtype),
        "num_warps": 8 if columns > 64 else 4,
        "num_stages": 1,
    }


@triton.jit
def _tile(num_items, WIDTH: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Give the program's items, all columns, and where there are such."""
    item, columns = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS), tl.arange(0, COLUMNS)
    return item, columns, within(item, num_items, columns, WIDTH)


@triton.jit
def _drop(x, kept, item, columns, mask, scale, WIDTH: tl.constexpr):
    return tl.where(load_rows(kept, item, columns, mask, WIDTH) > 0, x * scale, 0.0)


@triton.jit
def _before(
    u,
    position,
    kept,
    conv_in,
    conv_in_bias,
    gate_weights,
    gate_down,
    gate_down_bias,
    gate_up,
    gate_up_bias,
    c_out,
    gates,
    g_out,
    num_items,
    scale,
    SAVE: tl.constexpr,
    DROPPED: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ITEMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    item, columns, mask = _tile(num_items, WIDTH, ITEMS, COLUMNS)
    c = tl.zeros([ITEMS, COLUMNS], tl.float32) + load_bias(conv_in_bias, columns, WIDTH)
    c += convolved(u, conv_in, item, columns, num_items, position, -1, TAPS, WIDTH, WIDTH, ITEMS, SLICE, COLUMNS, FACTORS)
    if SAVE:
        store_rows(c_out, item, columns, c, mask, WIDTH)
    for first in range(0, 3 * WIDTH, SLICE):
        outputs = first + tl.arange(0, SLICE)
        w = load_matrix(gate_weights, outputs[None, :], columns[:, None], 3 * WIDTH, WIDTH)
        inside = within(item, num_items, outputs, 3 * WIDTH)
        store_rows(gates, item, outputs, product(c, w, FACTORS), inside, 3 * WIDTH)
    g = tl.zeros([ITEMS, COLUMNS], tl.float32) + load_bias(gate_up_bias, columns, WIDTH)
    for first in range(0, INNER, SLICE):
        inner = first + tl.arange(0, SLICE)
        a = product(c, load_matrix(gate_down, inner[None, :], columns[:, None], INNER, WIDTH), FACTORS)
        a += load_bias(gate_down_bias, inner, INNER)
        g += product(a * tl.sigmoid(a), load_matrix(gate_up, columns[None, :], inner[:, None], WIDTH, INNER), FACTORS)
    if DROPPED:
        g = _drop(g, kept, item, columns, mask, scale, WIDTH)
    store_rows(g_out, item, columns, g, mask, WIDTH)


@triton.jit
def _after(
    hidden,
    g,
    position,
    crossing,
    crossing_bias,
    conv_out,
    conv_out_bias,
    out,
    num_items,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ITEMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    item, columns, mask = _tile(num_items, WIDTH, ITEMS, COLUMNS)
    y = tl.zeros([ITEMS, COLUMNS], tl.float32) + load_bias(conv_out_bias, columns, WIDTH)
    for tap in tl.static_range(TAPS):
        h = shifted(hidden, item, num_items, position, TAPS - 1 - tap, columns, -1, WIDTH)
        for first in range(0, WIDTH, SLICE):
            inner = first + tl.arange(0, SLICE)
            phi = product(h, load_matrix(crossing, inner[None, :], columns[:, None], WIDTH, WIDTH), FACTORS)
            phi += load_bias(crossing_bias, inner, WIDTH)
            gate = shifted(g, item, num_items, position, TAPS - 1 - tap, inner, -1, WIDTH)  # zeros where there is no item
            w = load_matrix(conv_out + tap * WIDTH * WIDTH, inner[:, None], columns[None, :], WIDTH, WIDTH)
            y += product(gate * phi, w, FACTORS)
    store_rows(out, item, columns, y, mask, WIDTH)


@triton.jit
def _after_backward(
    grad_out,
    hidden,
    g,
    later,
    kept,
    crossing,
    crossing_bias,
    conv_out,
    gated,
    grad_phi,
    grad_g,
    grad_hidden,
    num_items,
    scale,
    DROPPED: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ITEMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    item, columns, mask = _tile(num_items, WIDTH, ITEMS, COLUMNS)
    d_gated = convolved(
        grad_out, conv_out, item, columns, num_items, later, 1, TAPS, WIDTH, WIDTH, ITEMS, SLICE, COLUMNS, FACTORS
    )
    phi = tl.zeros([ITEMS, COLUMNS], tl.float32) + load_bias(crossing_bias, columns, WIDTH)
    for first in range(0, WIDTH, SLICE):
        inputs = first + tl.arange(0, SLICE)
        h = load_rows(hidden, item, inputs, within(item, num_items, inputs, WIDTH), WIDTH)
        phi += product(h, load_matrix(crossing, columns[None, :], inputs[:, None], WIDTH, WIDTH), FACTORS)
    gate = load_rows(g, item, columns, mask, WIDTH)
    store_rows(gated, item, columns, gate * phi, mask, WIDTH)
    d_g = d_gated * phi
    if DROPPED:
        d_g = _drop(d_g, kept, item, columns, mask, scale, WIDTH)
    store_rows(grad_g, item, columns, d_g, mask, WIDTH)
    d_phi = d_gated * gate
    store_rows(grad_phi, item, columns, d_phi, mask, WIDTH)
    for first in range(0, WIDTH, SLICE):
        outputs = first + tl.arange(0, SLICE)
        dh = product(d_phi, load_matrix(crossing, columns[:, None], outputs[None, :], WIDTH, WIDTH), FACTORS)
        store_rows(grad_hidden, item, outputs, dh, within(item, num_items, outputs, WIDTH), WIDTH)


@triton.jit
def _before_backward(
    grad_gates,
    grad_g,
    c_in,
    gate_weights,
    gate_down,
    gate_down_bias,
    gate_up,
    silu,
    grad_a,
    grad_c,
    num_items,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ITEMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    item, columns, mask = _tile(num_items, WIDTH, ITEMS, COLUMNS)
    dc = tl.zeros([ITEMS, COLUMNS], tl.float32)
    for first in range(0, 3 * WIDTH, SLICE):
        outputs = first + tl.arange(0, SLICE)
        d_gates = load_rows(grad_gates, item, outputs, within(item, num_items, outputs, 3 * WIDTH), 3 * WIDTH)
        w = load_matrix(gate_weights, outputs[:, None], columns[None, :], 3 * WIDTH, WIDTH)
        dc += product(d_gates, w, FACTORS)
    c = load_rows(c_in, item, columns, mask, WIDTH)
    d_g = load_rows(grad_g, item, columns, mask, WIDTH)
    for first in range(0, INNER, SLICE):
        inner = first + tl.arange(0, SLICE)
        inside = within(item, num_items, inner, INNER)
        a = product(c, load_matrix(gate_down, inner[None, :], columns[:, None], INNER, WIDTH), FACTORS)
        a += load_bias(gate_down_bias, inner, INNER)
        sigmoid = tl.sigmoid(a)
        store_rows(silu, item, inner, a * sigmoid, inside, INNER)
        ds = product(d_g, load_matrix(gate_up, columns[:, None], inner[None, :], WIDTH, INNER), FACTORS)
        da = ds * sigmoid * (1 + a * (1 - sigmoid))
        store_rows(grad_a, item, inner, da, inside, INNER)
        dc += product(da, load_matrix(gate_down, inner[:, None], columns[None, :], INNER, WIDTH), FACTORS)
    store_rows(grad_c, item, columns, dc, mask, WIDTH)
