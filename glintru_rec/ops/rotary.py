"""Rotary embedding: turn pairs of features (2j, 2j + 1) by angles that depend on the position.

Shapes: T items, N vectors of each, D features of a vector.
"""

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The truth, in real arithmetic (see `rotate`)."""
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=3).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply every pair of features, as a complex number, by ``cos + i sin``.

    The angles are no parameters: they get no gradient.

    Args:
        x: ``[T, N, D]``.
        cos: cosines of the D / 2 angles of each item, ``[T, D/2]``.
        sin: their sines, ``[T, D/2]``.

    Returns:
        ``[T, N, D]``.
    """
    if torch.jit.is_scripting():
        return _turn(x, cos, sin)
    if torch.compiler.is_exporting():  # what is exported runs without this package, and exports know no complex numbers
        return rotate_reference(x, cos.to(x.dtype), sin.to(x.dtype))
    return _rotate(x.contiguous(), cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One multiplication of complex numbers: a pass over memory, where real arithmetic on strided halves takes six."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.reshape(x.size(0), x.size(1), x.size(2) // 2, 2))
    turned = pairs * torch.complex(cos.to(wide.dtype), sin.to(wide.dtype)).unsqueeze(1)
    return torch.view_as_real(turned).flatten(2).to(x.dtype)


@torch.library.custom_op("glintru_rec::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, cos, sin)


@_rotate.register_fake
def _(x, cos, sin):
    return torch.empty_like(x)


def _setup(ctx, inputs, output) -> None:
    _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, grad: Tensor):
    cos, sin = ctx.saved_tensors
    return rotate(grad, cos, -sin), None, None


_rotate.register_autograd(_gradients, setup_context=_setup)
