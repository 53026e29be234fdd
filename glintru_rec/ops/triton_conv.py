"""Ragged causal convolution on a GPU, dense and depthwise: kernels of `glintru_rec.ops.conv`.

    y_n = b + Σ_s W_s x_{n-s},    s = 0 .. k-1 items back,    x = 0 before a sequence's first item

The shifted copies of x that a matmul would need never exist. The gradient of x is the same convolution forward in time, with
transposed weights; the weights' gradient is summed over stretches of items, and these sums over the stretches.

Shapes: T items, D_in and D_out channels, k taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.jagged import lengths_from_offsets, positions, sequence_index
from glintru_rec.ops.triton_common import factors, fits, load_bias, load_matrix, load_rows, product, refuse, store_rows, within

ITEMS, INPUTS, OUTPUTS = 64, 32, 64  # of a tile
WIDEST = 2**31  # channels are taken in tiles
STRETCH = 1024  # items whose share of the weights' gradient one program sums


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take an input of such dtype and number of channels."""
    return fits(x, max(x.size(1), weight.size(0)), WIDEST)


def forward(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Convolve every sequence of a ragged batch over time, causally. All tensors are contiguous and of one dtype.

    Args:
        x: ``[T, D_in]``.
        weight: as ``torch.nn.Conv1d.weight``, ``[D_out, D_in, k]``, or ``[D_in, 1, k]`` for a depthwise one.
        bias: ``[D_out]``.
        offsets: int64 ``[B + 1]``, from 0 to T.

    Returns:
        ``[T, D_out]``.

    Raises:
        InputError: a dtype that the kernels do not take.
    """
    refuse("ragged_conv1d", x, x.size(1), WIDEST)
    out = x.new_empty(x.size(0), weight.size(0))
    if weight.size(1) != x.size(1):
        _run_depthwise(x, weight, bias, positions(offsets, x.size(0)), -1, out)
    else:
        _run_dense(x, weight.permute(2, 1, 0).contiguous(), bias, positions(offsets, x.size(0)), -1, out)
    return out


def backward(grad_out: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_out: gradient of the result, ``[T, D_out]``.
        x: as given to `forward`.
        weight: likewise.
        offsets: likewise.

    Returns:
        Gradients of ``x``, ``weight`` and ``bias``.
    """
    num_items = x.size(0)
    position, later = positions(offsets, num_items), items_after(offsets, num_items)
    if weight.size(1) != x.size(1):
        grad_x = torch.empty_like(x)
        _run_depthwise(grad_out, weight, weight.new_zeros(x.size(1)), later, 1, grad_x)
        grad_weight = _depthwise_weight_gradient(grad_out, x, weight, position)
    else:
        grad_x = dense_input_gradient(grad_out, weight, later)
        grad_weight = dense_weight_gradient(grad_out, x, weight, position)
    return grad_x, grad_weight, grad_out.sum(0)


def items_after(offsets: Tensor, num_items: int) -> Tensor:
    """Count the items that follow each item in its own sequence: int64 ``[T]``."""
    return lengths_from_offsets(offsets)[sequence_index(offsets, num_items)] - 1 - positions(offsets, num_items)


def dense_input_gradient(grad_out: Tensor, weight: Tensor, later: Tensor) -> Tensor:
    """Convolve ``[T, D_out]`` backward in time: ``[T, D_in]``; ``later`` is what `items_after` gives."""
    grad_x = grad_out.new_empty(grad_out.size(0), weight.size(1))
    _run_dense(grad_out, weight.permute(2, 0, 1).contiguous(), weight.new_zeros(weight.size(1)), later, 1, grad_x)
    return grad_x


def _run_dense(x: Tensor, weight: Tensor, bias: Tensor, room: Tensor, direction: int, out: Tensor) -> None:
    """Convolve with weights ``[k, D_in, D_out]`` for the last tap first, as `torch.nn.Conv1d` counts them."""
    grid = (triton.cdiv(x.size(0), ITEMS), triton.cdiv(out.size(1), OUTPUTS))
    if x.size(0) > 0:
        sizes = {"TAPS": weight.size(0), "D_IN": x.size(1), "D_OUT": out.size(1), "DIRECTION": direction}
        tiles = {"ITEMS": ITEMS, "INPUTS": INPUTS, "OUTPUTS": OUTPUTS, "FACTORS": factors(x.dtype)}
        _dense[grid](x, weight, bias, room, out, x.size(0), **sizes, **tiles, num_warps=4, num_stages=2)


def _run_depthwise(x: Tensor, weight: Tensor, bias: Tensor, room: Tensor, direction: int, out: Tensor) -> None:
    grid = (triton.cdiv(x.size(0), ITEMS), triton.cdiv(x.size(1), OUTPUTS))
    if x.size(0) > 0:
        sizes = {"TAPS": weight.size(2), "D": x.size(1), "DIRECTION": direction}
        _depthwise[grid](x, weight, bias, room, out, x.size(0), **sizes, ITEMS=ITEMS, OUTPUTS=OUTPUTS, num_warps=4)


def dense_weight_gradient(grad_out: Tensor, x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Sum grad_out ⊗ shifted x: ``[D_out, D_in, k]``; ``position`` is each item's place in its sequence."""
    d_out, d_in, taps = weight.shape
    stretches = triton.cdiv(x.size(0), STRETCH)
    shares = torch.empty(stretches, taps, d_in, d_out, dtype=torch.float32, device=x.device)
    if stretches > 0:
        grid = (stretches, taps * triton.cdiv(d_in, INPUTS), triton.cdiv(d_out, OUTPUTS))
        sizes = {"TAPS": taps, "D_IN": d_in, "D_OUT": d_out, "STRETCH": STRETCH}
        tiles = {"ITEMS": ITEMS, "INPUTS": INPUTS, "OUTPUTS": OUTPUTS, "FACTORS": factors(x.dtype)}
        _dense_weight[grid](grad_out, x, position, shares, x.size(0), **sizes, **tiles, num_warps=4, num_stages=1)
    return shares.sum(0).permute(2, 1, 0).to(weight.dtype).contiguous()


def _depthwise_weight_gradient(grad_out: Tensor, x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Sum grad_out ⊗ shifted x, channel by channel: ``[D, 1, k]``."""
    width, _, taps = weight.shape
    stretches = triton.cdiv(x.size(0), STRETCH)
    shares = torch.empty(stretches, width, 1, taps, dtype=torch.float32, device=x.device)
    if stretches > 0:
        grid = (stretches, taps, triton.cdiv(width, OUTPUTS))
        sizes = {"TAPS": taps, "D": width, "STRETCH": STRETCH, "ITEMS": ITEMS, "OUTPUTS": OUTPUTS}
        _depthwise_weight[grid](grad_out, x, position, shares, x.size(0), **sizes, num_warps=4)
    return shares.sum(0).to(weight.dtype)


@triton.jit
def shifted(x, item, num_items, room, back, channels, DIRECTION: tl.constexpr, WIDTH: tl.constexpr):
    """Read the items ``back`` steps before (or after) some items in fp32, zeros where the sequence has none there."""
    there = (item < num_items) & (tl.load(room + item, mask=item < num_items, other=-1) >= back)
    row = item.to(tl.int64) + DIRECTION * back
    return load_rows(x, row, channels, there[:, None] & (channels < WIDTH)[None, :], WIDTH)


@triton.jit
def convolved(
    x,
    weight,
    item,
    outputs,
    num_items,
    room,
    DIRECTION: tl.constexpr,
    TAPS: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    ITEMS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Convolve at some items and outputs with weights ``[k, D_in, D_out]``, INPUTS inputs at a time: fp32, without the bias."""
    y = tl.zeros([ITEMS, OUTPUTS], tl.float32)
    for tap in tl.static_range(TAPS):
        for first in range(0, D_IN, INPUTS):
            inputs = first + tl.arange(0, INPUTS)
            seen = shifted(x, item, num_items, room, TAPS - 1 - tap, inputs, DIRECTION, D_IN)
            w = load_matrix(weight + tap * D_IN * D_OUT, inputs[:, None], outputs[None, :], D_IN, D_OUT)
            y += product(seen, w, FACTORS)
    return y


@triton.jit
def _dense(
    x,
    weight,
    bias,
    room,
    out,
    num_items,
    TAPS: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    DIRECTION: tl.constexpr,
    ITEMS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FACTORS: tl.constexpr,
):
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    y = convolved(x, weight, item, outputs, num_items, room, DIRECTION, TAPS, D_IN, D_OUT, ITEMS, INPUTS, OUTPUTS, FACTORS)
    mask = within(item, num_items, outputs, D_OUT)
    store_rows(out, item, outputs, y + load_bias(bias, outputs, D_OUT), mask, D_OUT)


@triton.jit
def _dense_weight(
    grad_out,
    x,
    position,
    shares,
    num_items,
    TAPS: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    STRETCH: tl.constexpr,
    ITEMS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FACTORS: tl.constexpr,
):
    stretch, tap = tl.program_id(0), tl.program_id(1) % TAPS
    inputs = (tl.program_id(1) // TAPS) * INPUTS + tl.arange(0, INPUTS)
    outputs = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    share = tl.zeros([INPUTS, OUTPUTS], tl.float32)
    for first in range(stretch * STRETCH, min((stretch + 1) * STRETCH, num_items), ITEMS):
        item = first + tl.arange(0, ITEMS)
        seen = shifted(x, item, num_items, position, TAPS - 1 - tap, inputs, -1, D_IN)
        mask = within(item, num_items, outputs, D_OUT)
        dy = load_rows(grad_out, item, outputs, mask, D_OUT)
        share += product(tl.trans(seen), dy, FACTORS)
    inside = (inputs < D_IN)[:, None] & (outputs < D_OUT)[None, :]
    at = ((stretch * TAPS + tap).to(tl.int64) * D_IN + inputs[:, None]) * D_OUT + outputs[None, :]
    tl.store(shares + at, share, mask=inside)


@triton.jit
def _depthwise(
    x,
    weight,
    bias,
    room,
    out,
    num_items,
    TAPS: tl.constexpr,
    D: tl.constexpr,
    DIRECTION: tl.constexpr,
    ITEMS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    channels = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    y = tl.zeros([ITEMS, OUTPUTS], tl.float32) + load_bias(bias, channels, D)
    for tap in tl.static_range(TAPS):
        seen = shifted(x, item, num_items, room, TAPS - 1 - tap, channels, DIRECTION, D)
        y += seen * tl.load(weight + channels * TAPS + tap, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    mask = within(item, num_items, channels, D)
    store_rows(out, item, channels, y, mask, D)


@triton.jit
def _depthwise_weight(
    grad_out,
    x,
    position,
    shares,
    num_items,
    TAPS: tl.constexpr,
    D: tl.constexpr,
    STRETCH: tl.constexpr,
    ITEMS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    stretch, tap = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    share = tl.zeros([OUTPUTS], tl.float32)
    for first in range(stretch * STRETCH, min((stretch + 1) * STRETCH, num_items), ITEMS):
        item = first + tl.arange(0, ITEMS)
        seen = shifted(x, item, num_items, position, TAPS - 1 - tap, channels, -1, D)
        mask = within(item, num_items, channels, D)
        dy = load_rows(grad_out, item, channels, mask, D)
        share += tl.sum(seen * dy, 0)
    tl.store(shares + (stretch * D + channels) * TAPS + tap, share, mask=channels < D)
