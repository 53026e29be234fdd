"""Ragged 1-D convolution: ``torch.nn.Conv1d`` within each sequence, zeros beyond its ends.

A dense one is one matmul over the k shifted views of the input, a depthwise one k products.

Shapes: T items, D_in and D_out channels, k taps.
"""

from types import ModuleType

import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.jagged import lengths_from_offsets, positions, sequence_index
from glintru_rec.ops.implementation import triton_kernels


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
        return _convolve(x, weight, bias, offsets, causal)[0]
    save = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return _forward(x.contiguous(), weight.contiguous(), bias.contiguous(), offsets, causal, save, implementation)[0]


def _is_depthwise(x: Tensor, weight: Tensor) -> bool:
    return weight.size(1) != x.size(1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Forward pass: the result, and what each tap reads, ``[T, k, D_in]``."""
    taps, num_items = weight.size(2), x.size(0)
    windows = x.new_empty([num_items, taps, x.size(1)])
    for j in range(taps):
        first, last, shift, outside = _reach(j, taps, offsets, num_items, causal)
        windows[first:last, j] = x[first + shift : last + shift]
        windows[outside, j] = 0.0  # not a product with zero: what lies there may be infinite
    if not _is_depthwise(x, weight):
        return torch.addmm(bias, windows.view([num_items, taps * x.size(1)]), _flat(weight)), windows
    out = torch.addcmul(bias, windows[:, 0], weight[:, 0, 0])
    for j in range(1, taps):
        out.addcmul_(windows[:, j], weight[:, 0, j])
    return out, windows


def _reach(j: int, taps: int, offsets: Tensor, num_items: int, causal: bool) -> tuple[int, int, int, Tensor]:
    """Say what tap j reads: items ``first .. last`` that many rows on, ``shift``, except in ``outside``."""
    shift = j - (taps - 1 if causal else (taps - 1) // 2)
    first, last = min(max(-shift, 0), num_items), max(num_items - max(shift, 0), 0)
    place = positions(offsets, num_items) + shift
    outside = place < 0
    if shift > 0:
        outside = place >= lengths_from_offsets(offsets)[sequence_index(offsets, num_items)]
    return first, max(first, last), shift, outside.nonzero().squeeze(1)


def _flat(weight: Tensor) -> Tensor:
    """Lay a dense weight out as a matrix, ``[k * D_in, D_out]``."""
    return weight.permute(2, 1, 0).reshape([weight.size(2) * weight.size(1), weight.size(0)])


@torch.library.custom_op("glintru_rec::conv_forward", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, causal: bool, save: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    if _is_depthwise(x, weight) and (weight.size(1) != 1 or weight.size(0) != x.size(1)):
        shapes = f"weight {list(weight.shape)} and x {list(x.shape)}"
        raise InputError(f"ragged_conv1d: {shapes} fit neither a dense nor a depthwise convolution")
    kernels = _kernels(x, weight, causal, implementation)
    if kernels is not None:
        return kernels.forward(x, weight, bias, offsets), x.new_empty(0, weight.size(2), x.size(1))
    out, windows = _convolve(x, weight, bias, offsets, causal)
    return out, windows if save else x.new_empty(0, weight.size(2), x.size(1))


@torch.library.custom_op("glintru_rec::conv_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, windows: Tensor, causal: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(x, weight, causal, implementation)
    if kernels is not None:
        return kernels.backward(grad, x, weight, offsets)
    taps, num_items = weight.size(2), x.size(0)
    depthwise = _is_depthwise(x, weight)
    if depthwise:
        grad_weight = torch.stack([(grad * windows[:, j]).sum(0) for j in range(taps)], 1).unsqueeze(1)
    else:
        by_tap = (grad @ _flat(weight).t()).view(num_items, taps, x.size(1))  # gradients of the windows
        by_place = windows.view(num_items, taps * x.size(1)).t() @ grad
        grad_weight = by_place.view(taps, x.size(1), weight.size(0)).permute(2, 1, 0).contiguous()
    grad_x = torch.zeros_like(x)
    for j in range(taps):
        first, last, shift, outside = _reach(j, taps, offsets, num_items, causal)
        share = grad * weight[:, 0, j] if depthwise else by_tap[:, j]
        share[outside] = 0.0
        grad_x[first + shift : last + shift] += share[first:last]
    return grad_x, grad_weight, grad.sum(0)


def _kernels(x: Tensor, weight: Tensor, causal: bool, implementation: str) -> ModuleType | None:
    if not causal and implementation == "triton":
        raise InputError("ragged_conv1d: implementation is 'triton', whose kernels are causal, and causal is False")
    return triton_kernels("conv", implementation if causal else "torch", x, weight)


@_forward.register_fake
def _(x, weight, bias, offsets, causal, save, implementation):
    rows = x.size(0) if save and triton_kernels("conv", implementation if causal else "torch", x, weight) is None else 0
    return x.new_empty(x.size(0), weight.size(0)), x.new_empty(rows, weight.size(2), x.size(1))


@_backward.register_fake
def _(grad, x, weight, offsets, windows, causal, implementation):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.size(0))


def _setup(ctx, inputs, output) -> None:
    x, weight, _, offsets, causal, _, implementation = inputs
    ctx.save_for_backward(x, weight, offsets, output[1])
    ctx.causal, ctx.implementation = causal, implementation
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _):
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.implementation), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
