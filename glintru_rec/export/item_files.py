"""The item table of an artifact: NumPy files beside the model, which `map_array` maps into memory.

::

    item_vectors.npy   fp32, fp16: a row for each item, [V, Q];  int8: whole numbers from -127 to 127, [V, D]
    item_offsets.npy   int8: what is to be added to a row's numbers, float32 [V]
    item_scales.npy    int8: what the sums are to be multiplied by, float32 [V]: row = scale · (numbers + offset)
    item_biases.npy    int8 of items with a bias: these, float32 [V]: on a row's scale they would be rounded to nothing,
                       or the row would be
    inverse_norms.npy  cosine: 1 / |row| of the rows as stored, int8: of numbers + offset, float32 [V]

Shapes: V items, D width of the encoder, Q = D, or D + 1 where items have a bias.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glintru_rec.errors import InputError

VECTORS_FILE = "item_vectors.npy"
OFFSETS_FILE = "item_offsets.npy"
SCALES_FILE = "item_scales.npy"
BIASES_FILE = "item_biases.npy"
NORMS_FILE = "inverse_norms.npy"
PRECISIONS = ("fp32", "fp16", "int8")

_BLOCK_ROWS = 1 << 16
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_MAX_INT8 = 127
# Lattices that a row is tried on: how many steps half its range has, and how far, in steps, its middle is off a whole
# number. Their sums are below 127.5, so that numbers stay within 127.
_PEAKS = tuple(127.0 - half / 2 for half in range(8))
_SHIFTS = (-1 / 3, 0.0, 1 / 3)
_CACHED_ROWS = 1 << 10
_MIN_NORM = 1e-12  # as torch.nn.functional.normalize


def item_files(precision: str, cosine: bool, item_bias: bool) -> list[str]:
    """Name the files of an item table."""
    is_int8 = precision == "int8"
    wanted = {VECTORS_FILE: True, OFFSETS_FILE: is_int8, SCALES_FILE: is_int8}
    wanted |= {BIASES_FILE: is_int8 and item_bias, NORMS_FILE: cosine}
    return [name for name, is_wanted in wanted.items() if is_wanted]


def write_items(item_vectors: Tensor, width: int, cosine: bool, precision: str, folder: Path) -> None:
    """Write an item table in blocks of rows.

    Args:
        item_vectors: ``[V, Q]``, of any floating dtype.
        width: D.
        cosine: whether scores are cosines.
        precision: one of `PRECISIONS`.
        folder: where the files go.

    Raises:
        InputError: a number is too large for fp16.
    """
    num_items, vector_dim = item_vectors.shape
    columns = width if precision == "int8" else vector_dim
    files = {
        name: np.lib.format.open_memmap(
            folder / name,
            mode="w+",
            dtype=str(_DTYPES[precision]).removeprefix("torch.") if name == VECTORS_FILE else "float32",
            shape=(num_items, columns) if name == VECTORS_FILE else (num_items,),
        )
        for name in item_files(precision, cosine, vector_dim > width)
    }
    for start, rows in _blocks(item_vectors):
        block = slice(start, start + rows.size(0))
        stored = rows.to(_DTYPES[precision])
        if precision == "fp16" and bool((stored.isinf() & rows.isfinite()).any()):
            item = start + int((stored.isinf() & rows.isfinite()).any(dim=1).nonzero()[0])
            largest = float(rows[item - start].abs().max())
            raise InputError(f"item {item} has a component of {largest:.3g}, more than fp16 holds (65504); export fp32 or int8")
        if precision == "int8":
            stored, scales, offsets = quantize_rows(rows[:, :width])
            files[SCALES_FILE][block], files[OFFSETS_FILE][block] = scales, offsets
        if BIASES_FILE in files:
            files[BIASES_FILE][block] = rows[:, width]
        if NORMS_FILE in files:
            files[NORMS_FILE][block] = inverse_norms(stored + offsets.unsqueeze(1) if precision == "int8" else stored.float())
        files[VECTORS_FILE][block] = stored
    for file in files.values():
        file.flush()


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round every row to whole numbers with a scale and an offset of its own (affine quantization).

    Of the lattice that is symmetric about 0 and several that reach from a row's least number to its largest, which round
    it differently, the one of the least squared error is taken; scale and offset are fitted to the rounded numbers by
    least squares. A row's error is at most that of symmetric rounding, but for float32's own; what a random top 100 loses
    is about a seventh less than with a fitted scale alone (see docs/log.md).

    Args:
        rows: float32 ``[n, D]``.

    Returns:
        int8 ``[n, D]``, scales, float32 ``[n]``, and offsets, float32 ``[n]``: ``scales · (numbers + offsets)`` is near
        ``rows``. A row of equal numbers is kept exactly.
    """
    numbers, scales, offsets = zip(*(_quantized(part) for part in rows.split(_CACHED_ROWS)), strict=True)
    return torch.cat(numbers), torch.cat(scales), torch.cat(offsets)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = _or_one(rows.abs().amax(dim=1, keepdim=True))
    rows = rows / largest
    lowest, highest = rows.aminmax(dim=1, keepdim=True)
    origins, steps = torch.zeros_like(largest), torch.full_like(largest, 1 / _MAX_INT8)
    least = torch.full_like(largest, torch.inf)
    middle, half = (lowest + highest) / 2, _or_one((highest - lowest) / 2)
    lattices = [(middle + shift * half / peak, half / peak) for peak in _PEAKS for shift in _SHIFTS]
    lattices.append((origins, steps))
    for lattice in lattices:
        rounded = _rounded(rows, *lattice)
        origin, step = _fitted(rows, rounded)
        error = rounded.mul_(step).add_(origin).sub_(rows).square_().sum(1, keepdim=True)
        better = error < least
        origins, steps, least = origin.where(better, origins), step.where(better, steps), error.where(better, least)
    # Neither rounding to the fitted lattice nor fitting once more can add to the error.
    numbers = _rounded(rows, origins, steps)
    origins, steps = _fitted(rows, numbers)
    return numbers.to(torch.int8), (steps * largest).squeeze(1), (origins / steps).squeeze(1)


def _rounded(rows: Tensor, origins: Tensor, steps: Tensor) -> Tensor:
    return ((rows - origins) / steps).round_().clamp_(-_MAX_INT8, _MAX_INT8)


def _fitted(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Give the origins and steps, ``[n, 1]``, for which ``origins + steps · numbers`` is nearest to the rows."""
    mean = numbers.mean(1, keepdim=True)
    centred = numbers - mean
    steps = _or_one((rows * centred).sum(1, keepdim=True) / _or_one(centred.square().sum(1, keepdim=True)))
    return rows.mean(1, keepdim=True) - steps * mean, steps


def _or_one(values: Tensor) -> Tensor:
    """Put 1 where a value is 0, to divide by."""
    return torch.where(values > 0, values, torch.ones_like(values))


def inverse_norms(rows: Tensor) -> Tensor:
    """Give 1 / |row|, ``[n]``, as `torch.nn.functional.normalize` would divide."""
    return rows.norm(dim=1).clamp(min=_MIN_NORM).reciprocal()


def read_items(folder: Path) -> Tensor:
    """Read a table back as the float32 rows ``[V, Q]`` that it stands for."""
    rows = torch.from_numpy(np.load(folder / VECTORS_FILE)).float()
    if (folder / SCALES_FILE).exists():
        rows += torch.from_numpy(np.load(folder / OFFSETS_FILE)).unsqueeze(1)
        rows *= torch.from_numpy(np.load(folder / SCALES_FILE)).unsqueeze(1)
    if (folder / BIASES_FILE).exists():
        rows = torch.cat([rows, torch.from_numpy(np.load(folder / BIASES_FILE)).unsqueeze(1)], dim=1)
    return rows


def _blocks(item_vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, item_vectors.size(0), _BLOCK_ROWS):
        yield start, item_vectors[start : start + _BLOCK_ROWS].float()
