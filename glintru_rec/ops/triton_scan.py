"""Ragged diagonal complex recurrence on a GPU: the kernels of `glintru_rec.ops.diagonal_scan`, which has the equations.

A program takes some features of one sequence, a tile of time steps after the other. A step is the map ``h ↦ λ h + b``; maps
compose, ``(c, d) ∘ (a, b) = (c a, c b + d)``, so the steps of a tile are an associative scan, all of them read at one time.
The backward pass is the same scan from the end, with the conjugate of λ.

Shapes: T items, B sequences, S complex features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.ops.triton_common import ends, fits, refuse

STEPS, FEATURES = 32, 32  # of a tile
WIDEST = 2**31  # features are independent


def takes(inputs: Tensor) -> bool:
    """Whether the kernels take inputs ``[T, 2, S]`` of such dtype."""
    return fits(inputs, inputs.size(2), WIDEST)


def forward(inputs: Tensor, decay: Tensor, initial: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a ragged batch. All tensors are contiguous and of one dtype.

    Args:
        inputs: b, ``[T, 2, S]``.
        decay: λ, ``[2, S]``.
        initial: state before the first item, ``[B, 2, S]``.
        offsets: int64 ``[B + 1]``, from 0 to T.

    Returns:
        The state after every item, ``[T, 2, S]``, and after each sequence's last one, ``[B, 2, S]``.

    Raises:
        InputError: a dtype that the kernels do not take.
    """
    refuse("diagonal_scan", inputs, inputs.size(2), WIDEST)
    num_sequences, _, width = initial.shape
    states, last = torch.empty_like(inputs), torch.empty_like(initial)
    if initial.numel() > 0:
        _forward[_grid(num_sequences, width)](inputs, decay, initial, offsets, states, last, width, **_shape())
    return states, last


def backward(
    grad_states: Tensor, grad_last: Tensor, decay: Tensor, initial: Tensor, offsets: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `forward`'s inputs.

    Args:
        grad_states: gradient of the states, ``[T, 2, S]``.
        grad_last: gradient of the last states, ``[B, 2, S]``.
        decay: as given to `forward`.
        initial: likewise.
        offsets: likewise.
        states: what it gave, ``[T, 2, S]``.

    Returns:
        Gradients of ``inputs``, ``decay`` and ``initial``.
    """
    num_sequences, _, width = initial.shape
    grad_inputs, grad_initial = torch.empty_like(states), torch.empty_like(initial)
    # Each sequence's own share: their sum has one order, which atomic additions would not have.
    grad_decay = torch.empty(initial.shape, dtype=torch.float32, device=initial.device)
    if initial.numel() > 0:
        incoming = (grad_states, grad_last, decay, initial, offsets, states)
        _backward[_grid(num_sequences, width)](*incoming, grad_inputs, grad_decay, grad_initial, width, **_shape())
    return grad_inputs, grad_decay.sum(0).to(decay.dtype), grad_initial


def _grid(num_sequences: int, width: int) -> tuple[int, int]:
    return num_sequences, triton.cdiv(width, FEATURES)


def _shape() -> dict:
    return {"STEPS": STEPS, "FEATURES": FEATURES, "num_warps": 2}


@triton.jit
def _compose(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    """Give the map h ↦ c (a h + b) + d."""
    return (
        c_re * a_re - c_im * a_im,
        c_re * a_im + c_im * a_re,
        c_re * b_re - c_im * b_im + d_re,
        c_re * b_im + c_im * b_re + d_im,
    )


@triton.jit
def _load(pointer, row, features, width, mask):
    """Read real and imaginary parts in fp32, zeros where the mask is not set."""
    at = pointer + row * 2 * width + features
    return tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + width, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, features, width, mask, re, im):
    at = pointer + row * 2 * width + features
    tl.store(at, re, mask=mask)
    tl.store(at + width, im, mask=mask)


@triton.jit
def _row(x, number, STEPS: tl.constexpr):
    """Pick one row of a tile."""
    return tl.sum(tl.where((tl.arange(0, STEPS) == number)[:, None], x, 0.0), 0)


@triton.jit
def _place(offsets, width, FEATURES: tl.constexpr):
    """Give the program's sequence and its ends, its features, and which of these there are."""
    sequence = tl.program_id(0).to(tl.int64)
    start, end = ends(offsets, sequence)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    return sequence, start, end, features, features < width


@triton.jit
def _forward(inputs, decay, initial, offsets, states, last, width, STEPS: tl.constexpr, FEATURES: tl.constexpr):
    sequence, start, end, features, inside = _place(offsets, width, FEATURES)
    decay_re, decay_im = _load(decay, 0, features, width, inside)
    h_re, h_im = _load(initial, sequence, features, width, inside)
    for first in range(start, end, STEPS):
        row = (first + tl.arange(0, STEPS))[:, None]
        known = row < end
        mask = known & inside[None, :]
        b_re, b_im = _load(inputs, row, features[None, :], width, mask)
        # Past the end a step changes nothing, so the tile's last row is the sequence's last state.
        a_re = tl.where(known, decay_re[None, :], 1.0)
        a_im = tl.where(known, decay_im[None, :], 0.0)
        a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 0, _compose)
        re = a_re * h_re[None, :] - a_im * h_im[None, :] + b_re
        im = a_re * h_im[None, :] + a_im * h_re[None, :] + b_im
        _store(states, row, features[None, :], width, mask, re, im)
        h_re, h_im = _row(re, STEPS - 1, STEPS), _row(im, STEPS - 1, STEPS)
    _store(last, sequence, features, width, inside, h_re, h_im)


@triton.jit
def _backward(
    grad_states,
    grad_last,
    decay,
    initial,
    offsets,
    states,
    grad_inputs,
    grad_decay,
    grad_initial,
    width,
    STEPS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    sequence, start, end, features, inside = _place(offsets, width, FEATURES)
    decay_re, decay_im = _load(decay, 0, features, width, inside)
    decay_im = -decay_im  # λ̄
    first_re, first_im = _load(initial, sequence, features, width, inside)
    last_re, last_im = _load(grad_last, sequence, features, width, inside)
    g_re = tl.zeros([FEATURES], tl.float32)
    g_im = tl.zeros([FEATURES], tl.float32)
    sum_re = tl.zeros([FEATURES], tl.float32)
    sum_im = tl.zeros([FEATURES], tl.float32)
    for back in range(0, end - start, STEPS):
        row = (end - back - STEPS + tl.arange(0, STEPS))[:, None]
        known = row >= start
        mask = known & inside[None, :]
        b_re, b_im = _load(grad_states, row, features[None, :], width, mask)
        b_re += tl.where(row == end - 1, last_re[None, :], 0.0)
        b_im += tl.where(row == end - 1, last_im[None, :], 0.0)
        a_re = tl.where(known, decay_re[None, :], 1.0)
        a_im = tl.where(known, decay_im[None, :], 0.0)
        a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 0, _compose, reverse=True)
        re = a_re * g_re[None, :] - a_im * g_im[None, :] + b_re
        im = a_re * g_im[None, :] + a_im * g_re[None, :] + b_im
        _store(grad_inputs, row, features[None, :], width, mask, re, im)
        h_re, h_im = _load(states, row - 1, features[None, :], width, mask & (row > start))
        h_re += tl.where(row == start, first_re[None, :], 0.0)
        h_im += tl.where(row == start, first_im[None, :], 0.0)
        sum_re += tl.sum(tl.where(mask, re * h_re + im * h_im, 0.0), 0)
        sum_im += tl.sum(tl.where(mask, im * h_re - re * h_im, 0.0), 0)
        g_re, g_im = _row(re, 0, STEPS), _row(im, 0, STEPS)
    empty = start == end
    out_re = tl.where(empty, last_re, decay_re * g_re - decay_im * g_im)
    out_im = tl.where(empty, last_im, decay_re * g_im + decay_im * g_re)
    _store(grad_initial, sequence, features, width, inside, out_re, out_im)
    _store(grad_decay, sequence, features, width, inside, sum_re, sum_im)
