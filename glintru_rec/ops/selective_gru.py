"""Dense selective GRU over a ragged batch: a GRU between two convolutions, its output gated by what it was given.

    c = conv(u)    h = GRU(c)    Φ = h W_H + b_H    g = dropout(SiLU(c Wδ + bδ) WΩ + bΩ)    Y = conv(g ⊗ Φ)

The torch code composes the operators of the parts. On a GPU three kernels do it (`glintru_rec.ops.triton_selective_gru`).

Shapes: T items, B sequences, D width, k taps.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glintru_rec.errors import InputError
from glintru_rec.ops.conv import conv_reference, ragged_conv1d
from glintru_rec.ops.dropout import dropout
from glintru_rec.ops.gru import gru_reference, ragged_gru
from glintru_rec.ops.implementation import triton_kernels, under_autocast


class SelectiveGRUWeights(NamedTuple):
    """Weights of all layers but the gate, each as its `torch.nn` layer has them."""

    conv_in: Tensor
    """``[D, D, k]``."""
    conv_in_bias: Tensor
    """``[D]``."""
    gates: Tensor
    """Input-to-hidden weights of the GRU, ``[3*D, D]``."""
    recurrent: Tensor
    """Hidden-to-hidden weights of the GRU, ``[3*D, D]``."""
    crossing: Tensor
    """W_H, ``[D, D]``."""
    crossing_bias: Tensor
    """b_H, ``[D]``."""
    conv_out: Tensor
    """``[D, D, k]``."""
    conv_out_bias: Tensor
    """``[D]``."""


class SelectiveGate(NamedTuple):
    """Weights of the selective gate, of inner width E."""

    down: Tensor
    """Wδ, ``[E, D]``."""
    down_bias: Tensor
    """bδ, ``[E]``."""
    up: Tensor
    """WΩ, ``[D, E]``."""
    up_bias: Tensor
    """bΩ, ``[D]``."""


def selective_gru_reference(
    u: Tensor,
    weights: SelectiveGRUWeights,
    gate: SelectiveGate,
    offsets: Tensor,
    initial: Tensor,
    scale: Tensor | float = 1.0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The truth, out of those of the parts (see `selective_gru`); dropout multiplies the gate by ``scale``."""
    c = conv_reference(u, weights.conv_in, weights.conv_in_bias, offsets, causal)
    h, last = gru_reference(c @ weights.gates.t(), weights.recurrent, offsets, initial)
    a = c @ gate.down.t() + gate.down_bias
    g = ((a * torch.sigmoid(a)) @ gate.up.t() + gate.up_bias) * scale
    gated = g * (h @ weights.crossing.t() + weights.crossing_bias)
    return conv_reference(gated, weights.conv_out, weights.conv_out_bias, offsets, causal), last


def selective_gru(
    u: Tensor,
    weights: SelectiveGRUWeights,
    gate: SelectiveGate | None,
    offsets: Tensor,
    initial: Tensor | None = None,
    causal: bool = True,
    rate: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the dense selective GRU over a ragged batch.

    Sequences never see each other: running a batch equals running its sequences one by one.

    Args:
        u: ``[T, D]``.
        weights: of all layers but the gate.
        gate: of the gate; without it Y = conv(Φ).
        offsets: where each sequence starts in ``u``, int64 ``[B + 1]``, from 0 to T.
        initial: the GRU's state before the first item, ``[B, D]``; zeros when absent.
        causal: whether the convolutions see the past only.
        rate: of dropout on the gate; 0 outside training.
        implementation: ``auto``, ``torch`` or ``triton`` (see `glintru_rec.ops.implementation`); Triton's is causal and has
            a gate.

    Returns:
        Y ``[T, D]``, and the GRU's state after each sequence's last item, ``[B, D]``.

    Raises:
        InputError: the implementation is not to be had.
    """
    if torch.jit.is_scripting():
        out, last, _ = composed(u, weights, gate, offsets, initial, causal, rate)
        return out, last
    if implementation == "triton" and (gate is None or not causal):
        raise InputError("selective_gru: implementation is 'triton', whose kernels are causal and have a gate")
    width = weights.recurrent.size(1)
    if gate is None or not (causal and _kernels_run(implementation, u.device, u.dtype, width)):
        out, last, _ = composed(u, weights, gate, offsets, initial, causal, rate, implementation)
        return out, last
    if initial is None:
        initial = u.new_zeros(offsets.numel() - 1, u.size(1))
    kept = torch.empty_like(u, dtype=torch.bool).bernoulli_(1 - rate) if rate > 0 else None
    tensors = [x.contiguous() for x in (u, initial, *weights, *gate)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _forward(tensors[0], tensors[2:], tensors[1], offsets, kept, rate, save)[:2]


def composed(
    u: Tensor,
    weights: SelectiveGRUWeights,
    gate: SelectiveGate | None,
    offsets: Tensor,
    initial: Tensor | None,
    causal: bool,
    rate: float,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as `selective_gru` with the operators of the parts; give g ⊗ Φ ``[T, D]`` too."""
    c = ragged_conv1d(u, weights.conv_in, weights.conv_in_bias, offsets, causal, implementation)
    h, last = ragged_gru(functional.linear(c, weights.gates), weights.recurrent, offsets, initial, implementation)
    gated = gated_crossing(c, h, weights, gate, rate)
    return ragged_conv1d(gated, weights.conv_out, weights.conv_out_bias, offsets, causal, implementation), last, gated


def gated_crossing(c: Tensor, h: Tensor, weights: SelectiveGRUWeights, gate: SelectiveGate | None, rate: float) -> Tensor:
    """Give g ⊗ Φ, or Φ without a gate: ``[*, D]``."""
    phi = functional.linear(h, weights.crossing, weights.crossing_bias)
    if gate is None:
        return phi
    g = functional.linear(functional.silu(functional.linear(c, gate.down, gate.down_bias)), gate.up, gate.up_bias)
    return (dropout(g, rate) if rate > 0 else g) * phi


def _kernels_run(implementation: str, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    return triton_kernels("selective_gru", implementation, torch.empty(0, width, device=device, dtype=dtype)) is not None


# A compiler must not look into how modules are found. torch.compiler.assume_constant_result sets just this, but loads the
# compiler to do so, which would be most of the time that importing this package takes.
_kernels_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kernels(u: Tensor) -> ModuleType:
    kernels = triton_kernels("selective_gru", "triton", u)
    assert kernels is not None
    return kernels


@torch.library.custom_op("glintru_rec::selective_gru_forward", mutates_args=())
def _forward(
    u: Tensor, weights: list[Tensor], initial: Tensor, offsets: Tensor, kept: Tensor | None, rate: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kernels(u).forward(u, *_named(weights), initial, offsets, kept, rate, save)


@torch.library.custom_op("glintru_rec::selective_gru_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    weights: list[Tensor],
    initial: Tensor,
    offsets: Tensor,
    kept: Tensor | None,
    rate: float,
    saved: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor]:
    given = (grad_out, grad_last, u, *_named(weights), initial, offsets, kept, rate)
    grad_u, grad_weights, grad_gate, grad_initial = _kernels(u).backward(*given, *saved)
    return grad_u, [*grad_weights, *grad_gate], grad_initial


def _named(tensors: list[Tensor]) -> tuple[SelectiveGRUWeights, SelectiveGate]:
    return SelectiveGRUWeights(*tensors[:8]), SelectiveGate(*tensors[8:])


@_forward.register_fake
def _(u, weights, initial, offsets, kept, rate, save):
    items, width = u.size(0) if save else 0, u.size(1)
    saved = [u.new_empty(items, features) for features in (width, width, width, 4 * width)]
    return torch.empty_like(u), torch.empty_like(initial), *saved


@_backward.register_fake
def _(grad_out, grad_last, u, weights, initial, offsets, kept, rate, saved):
    return torch.empty_like(u), [torch.empty_like(x) for x in weights], torch.empty_like(initial)


def _setup(ctx, inputs, output) -> None:
    u, weights, initial, offsets, kept, ctx.rate, _ = inputs
    saved = output[2:]
    ctx.save_for_backward(u, initial, offsets, kept, *saved, *weights)
    ctx.mark_non_differentiable(*saved)


def _gradients(ctx, grad_out: Tensor, grad_last: Tensor, *_):
    u, initial, offsets, kept, *rest = ctx.saved_tensors
    inputs = (u, rest[4:], initial, offsets, kept, ctx.rate)
    return *_backward(grad_out.contiguous(), grad_last.contiguous(), *inputs, rest[:4]), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
under_autocast(_forward, torch.float32)
