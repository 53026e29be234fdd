"""Ragged 1-D convolution: ``torch.nn.Conv1d`` within each sequence, zeros beyond its ends.

A dense one is one matmul over the k shifted views of the input, a depthwise one k products. Backward the same views are of the
gradient, shifted the other way: nothing of the forward pass is kept but the input, and the gradients are matmuls as they are.

Shapes: T items, D_in and D_out channels, k taps.
"""

from types import ModuleType

import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.jagged import lengths_from_offsets, positions, sequence_index
from glintru_rec.ops.implementation import triton_kernels, under_autocast


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """The truth: one item, one tap after another (see `ragged_conv1d`)."""
    taps = weight.size(2)
    out = []
    for b in range(offsets.numel() - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        for n in range(start, end):
            y = bias.clone()
            for j in range(taps):
                m = n + j - (taps - 1 if causal else (taps - 1) // 2)
                if start <= m < end:
                    y = y + (weight[:, 0, j] * x[m] if _is_depthwise(x, weight) else weight[:, :, j] @ x[m])
            out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, weight.size(0))


def ragged_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool, implementation: str = "auto"
) -> Tensor:
    """Convolve every sequence of a ragged batch over time.

    Args:
        x: ``[T, D_in]``.
        weight: as ``torch.nn.Conv1d.weight``, ``[D_out, D_in, k]``, or ``[D_in, 1, k]`` for a depthwise one.
        bias: ``[D_out]``.
        offsets: int64 ``[B + 1]``.
        causal: position n reads items ``n-k+1 .. n``; otherwise the k items centred on n.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`); Triton's is causal.

    Returns:
        ``[T, D_out]``.

    Raises:
        InputError: the implementation is not to be had, or the weight fits neither convolution.
    """
    if torch.jit.is_scripting():
        return _convolve(x, weight, bias, offsets, causal)
    return _forward(x.contiguous(), weight.contiguous(), bias.contiguous(), offsets, causal, implementation)


def _is_depthwise(x: Tensor, weight: Tensor) -> bool:
    return weight.size(1) != x.size(1)


def _shifts(taps: int, causal: bool) -> list[int]:
    """How many rows on each tap reads."""
    return [j - (taps - 1 if causal else (taps - 1) // 2) for j in range(taps)]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Forward pass."""
    shifts = _shifts(weight.size(2), causal)
    if not _is_depthwise(x, weight):
        return torch.addmm(bias, _windows(x, shifts, offsets), _flat(weight))
    place, num_after = _places(offsets, x.size(0))
    by_tap = weight.view([x.size(1), weight.size(2)]).t().contiguous()  # rows are read in one piece, several times faster
    out = bias.repeat([x.size(0), 1])
    for j, shift in enumerate(shifts):
        out.addcmul_(_shifted(x, shift, place, num_after), by_tap[j])
    return out


def _places(offsets: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Count the items before and after each one in its sequence, int64 ``[T]`` both."""
    place = positions(offsets, num_items)
    return place, lengths_from_offsets(offsets)[sequence_index(offsets, num_items)] - 1 - place


def _windows(x: Tensor, shifts: list[int], offsets: Tensor) -> Tensor:
    """Lay ``x``, shifted in each of these ways (see `_shifted`), side by side: ``[T, k * D_in]``."""
    place, num_after = _places(offsets, x.size(0))
    windows = x.new_empty([x.size(0), len(shifts), x.size(1)])
    for j, shift in enumerate(shifts):
        first, last, outside = _reach(shift, place, num_after)
        windows[first:last, j] = x[first + shift : last + shift]
        windows[outside, j] = 0.0  # not a product with zero: what lies there may be infinite
    return windows.view([x.size(0), len(shifts) * x.size(1)])


def _shifted(x: Tensor, shift: int, place: Tensor, num_after: Tensor) -> Tensor:
    """Give each item the row that many rows on, zeros where that is another sequence's."""
    if shift == 0:
        return x
    out = torch.empty_like(x)
    first, last, outside = _reach(shift, place, num_after)
    out[first:last] = x[first + shift : last + shift]
    out[outside] = 0.0
    return out


def _reach(shift: int, place: Tensor, num_after: Tensor) -> tuple[int, int, Tensor]:
    """Say which items, ``first .. last``, have a row that many rows on, and which of them in another sequence or nowhere."""
    num_items = place.size(0)
    first, last = min(max(-shift, 0), num_items), max(num_items - max(shift, 0), 0)
    outside = (place < -shift) if shift < 0 else (num_after < shift)
    return first, max(first, last), outside.nonzero().squeeze(1)


def _flat(weight: Tensor) -> Tensor:
    """Lay a dense weight out as a matrix, ``[k * D_in, D_out]``."""
    return weight.permute(2, 1, 0).reshape([weight.size(2) * weight.size(1), weight.size(0)])


@torch.library.custom_op("glintru_rec::conv_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool, implementation: str) -> Tensor:
    if _is_depthwise(x, weight) and (weight.size(1) != 1 or weight.size(0) != x.size(1)):
        shapes = f"weight {list(weight.shape)} and x {list(x.shape)}"
        raise InputError(f"ragged_conv1d: {shapes} fit neither a dense nor a depthwise convolution")
    kernels = _kernels(x, weight, causal, implementation)
    if kernels is not None:
        return kernels.forward(x, weight, bias, offsets)
    return _convolve(x, weight, bias, offsets, causal)


@torch.library.custom_op("glintru_rec::conv_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, causal: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(x, weight, causal, implementation)
    if kernels is not None:
        return kernels.backward(grad, x, weight, offsets)
    taps, (width_out, width_in) = weight.size(2), (weight.size(0), x.size(1))
    shifts = [-shift for shift in _shifts(taps, causal)]
    if not _is_depthwise(x, weight):
        windows = _windows(grad, shifts, offsets)
        grad_x = windows @ weight.permute(2, 0, 1).reshape(taps * width_out, width_in)
        grad_weight = (windows.t() @ x).view(taps, width_out, width_in).permute(1, 2, 0).contiguous()
        return grad_x, grad_weight, grad.sum(0)
    by_tap = weight.view(width_in, taps).t().contiguous()
    grad_x, grad_by_tap = torch.zeros_like(x), torch.empty_like(by_tap)
    place, num_after = _places(offsets, x.size(0))
    for j, shift in enumerate(shifts):
        shifted = _shifted(grad, shift, place, num_after)
        grad_x.addcmul_(shifted, by_tap[j])
        torch.sum(shifted * x, 0, out=grad_by_tap[j])
    return grad_x, grad_by_tap.t().contiguous().view(weight.shape), grad.sum(0)


def _kernels(x: Tensor, weight: Tensor, causal: bool, implementation: str) -> ModuleType | None:
    if not causal and implementation == "triton":
        raise InputError("ragged_conv1d: implementation is 'triton', whose kernels are causal, and causal is False")
    return triton_kernels("conv", implementation if causal else "torch", x, weight)


@_forward.register_fake
def _(x, weight, bias, offsets, causal, implementation):
    return x.new_empty(x.size(0), weight.size(0))


@_backward.register_fake
def _(grad, x, weight, offsets, causal, implementation):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.size(0))


def _setup(ctx, inputs, output) -> None:
    x, weight, _, offsets, ctx.causal, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, offsets)


def _gradients(ctx, grad: Tensor):
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.implementation), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
under_autocast(_forward, torch.bfloat16)
