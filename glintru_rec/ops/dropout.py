"""Dropout whose mask costs two random bytes an element on the CPU, where torch draws a float each."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 1 << 16


# The tag keeps a compiler from drawing again in the backward pass.
@torch.library.custom_op("glintru_rec::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _random_bits(after: Tensor, size: list[int]) -> Tensor:
    """Draw 16 random bits for each of ``size`` elements from torch's global generator: int16.

    A compiler takes calls with equal arguments for the same draw, so each call has ``after``, an empty part of a tensor of
    its own.
    """
    numel = torch.Size(size).numel()
    bits = torch.empty(-(-numel // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)  # four elements a draw
    return bits.view(torch.int16)[:numel].view(size)


@_random_bits.register_fake
def _(after, size):
    return after.new_empty(size, dtype=torch.int16)


def dropout_scale(x: Tensor, size: list[int], rate: float) -> Tensor:
    """Draw 0 with probability ``rate``, else the scale that makes the mean 1: ``size``, of the dtype and device of ``x``.

    On the CPU the rate is rounded to a multiple of 2^-16. Two draws need two different ``x`` (see `_random_bits`).
    """
    if torch.jit.is_scripting() or x.is_cuda:
        return functional.dropout(torch.ones(size, dtype=x.dtype, device=x.device), rate)
    kept = max(1, round((1 - rate) * _LEVELS))
    bits = _random_bits(x.detach()[:0], size)
    mask = torch.lt(bits, kept - _LEVELS // 2, out=torch.empty(size, dtype=x.dtype))  # spares a pass over memory
    return mask.mul_(_LEVELS / kept)


def dropout_seed(x: Tensor) -> Tensor:
    """Draw a seed from torch's global generator: int64 ``[1]`` on the CPU. Two draws need two different ``x``."""
    return _random_bits(x.detach().flatten()[:0].cpu(), [4]).view(torch.int64)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero elements of ``x`` with probability ``rate`` and scale the others (see `dropout_scale`)."""
    if torch.jit.is_scripting() or x.is_cuda:
        return functional.dropout(x, rate)
    return x * dropout_scale(x, list(x.shape), rate)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, with a faster mask on the CPU (see `dropout_scale`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements of ``x`` at random while training."""
        return dropout(x, self.p) if self.training and self.p > 0 else x
