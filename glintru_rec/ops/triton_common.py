"""What the kernels share: which inputs they take, how they multiply, how sequences are grouped."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glintru_rec.errors import InputError


def fits(x: Tensor, width: int, widest: int) -> bool:
    """Whether kernels whose tiles hold ``widest`` features of bfloat16, or half as many of float32, take ``x``."""
    return width <= {torch.bfloat16: widest, torch.float32: widest // 2}.get(x.dtype, 0)


def refuse(op: str, x: Tensor, width: int, widest: int) -> None:
    """Refuse what the kernels do not take.

    Raises:
        InputError: another dtype than float32 and bfloat16, or a width whose tiles would not fit on chip.
    """
    if not fits(x, width, widest):
        most = f"bfloat16 up to width {widest} and float32 up to {widest // 2}"
        raise InputError(f"the Triton kernels of {op} take {most}, not {x.dtype} of width {width}: use implementation='torch'")


def block(width: int) -> int:
    """Round up to a side of a tile that ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def factors(dtype: torch.dtype) -> tl.dtype:
    """Give the dtype of a matrix product's factors; sums are float32 always.

    The interpreter multiplies bfloat16 wrongly and without a word, so there every factor is float32.
    """
    if triton.knobs.runtime.interpret:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def longest_first(offsets: Tensor) -> Tensor:
    """Rank the sequences by falling length, so that those of one tile end together: int64 ``[B]``, without a host sync."""
    return torch.argsort(offsets[1:] - offsets[:-1], descending=True, stable=True)


@triton.jit
def product(a, b, FACTORS: tl.constexpr):
    """Multiply ``[M, K] x [K, N]`` with factors in FACTORS, to about fp32's precision where that is float32."""
    return tl.dot(a.to(FACTORS), b.to(FACTORS), input_precision="tf32x3")


@triton.jit
def ends(offsets, sequence):
    """Give a sequence's first row, and the one past its last."""
    return tl.load(offsets + sequence), tl.load(offsets + sequence + 1)


@triton.jit
def within(row, size, columns, WIDTH: tl.constexpr):
    """Say which numbers of a tile a matrix ``[size, WIDTH]`` has."""
    return (row < size)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def load_rows(pointer, row, columns, mask, STRIDE: tl.constexpr):
    """Read rows of STRIDE numbers in fp32, zeros where the mask is not set."""
    return tl.load(pointer + row.to(tl.int64)[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, row, columns, x, mask, STRIDE: tl.constexpr):
    """Write rows of STRIDE numbers where the mask is set."""
    tl.store(pointer + row.to(tl.int64)[:, None] * STRIDE + columns[None, :], x, mask=mask)


@triton.jit
def load_matrix(pointer, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Read a part of a matrix ``[HEIGHT, WIDTH]``, zeros outside; the two index arrays broadcast to the tile."""
    inside = (rows < HEIGHT) & (columns < WIDTH)
    return tl.load(pointer + rows * WIDTH + columns, mask=inside, other=0.0)


@triton.jit
def load_bias(pointer, columns, WIDTH: tl.constexpr):
    """Read a vector ``[WIDTH]`` as a row in fp32, zeros past its end."""
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
