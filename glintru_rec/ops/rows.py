"""Move rows between layouts, with a backward pass that is a copy too.

Indexing in autograd assumes that an index may repeat, so its gradient is an atomic (on CPU: serial) accumulation.
Every row map in this package is one-to-one; its gradient is the opposite move.
"""

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.size(0)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (rows,) = ctx.saved_tensors
        return scatter_rows(grads[0], rows, ctx.num_rows), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros([num_rows, *x.shape[1:]]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (rows,) = ctx.saved_tensors
        return gather_rows(grads[0], rows), None, None


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Read rows: ``out[i] = x[rows[i]]``.

    Args:
        x: ``[N, ...]``.
        rows: int64 ``[M]``, no row twice.
    """
    if torch.jit.is_scripting():
        return x.index_select(0, rows)
    return _Gather.apply(x, rows)


def scatter_rows(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Write rows into zeros: ``out[rows[i]] = x[i]``.

    Args:
        x: ``[M, ...]``.
        rows: int64 ``[M]``, no row twice.
        num_rows: rows of the result.
    """
    if torch.jit.is_scripting():
        shape = list(x.shape)
        shape[0] = num_rows
        return torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy_(0, rows, x)
    return _Scatter.apply(x, rows, num_rows)
