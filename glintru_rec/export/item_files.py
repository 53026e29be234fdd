"""The item table of an artifact: NumPy files beside the model, which `map_array` maps into memory.

::

    item_vectors.npy   fp32, fp16: a row for each item, [V, Q];  int8: whole numbers from -127 to 127, [V, D]
    item_scales.npy    int8: what a row is to be multiplied by, float32 [V]
    item_biases.npy    int8 of items with a bias: these, float32 [V]: on a row's scale they would be rounded to nothing,
                       or the row would be
    inverse_norms.npy  cosine: 1 / |row| of the rows as stored, float32 [V]

Shapes: V items, D width of the encoder, Q = D, or D + 1 where items have a bias.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glintru_rec.errors import InputError

VECTORS_FILE = "item_vectors.npy"
SCALES_FILE = "item_scales.npy"
BIASES_FILE = "item_biases.npy"
NORMS_FILE = "inverse_norms.npy"
PRECISIONS = ("fp32", "fp16", "int8")

_BLOCK_ROWS = 1 << 16
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_MAX_INT8 = 127
# What a row's largest magnitude may become before it is rounded; below 127.5, so that it stays within 127.
_PEAKS = (127.49, *(127.0 - step / 2 for step in range(15)))
_CACHED_ROWS = 1 << 10
_MIN_NORM = 1e-12  # as torch.nn.functional.normalize


def item_files(precision: str, cosine: bool, item_bias: bool) -> list[str]:
    """Name the files of an item table."""
    is_int8 = precision == "int8"
    wanted = {VECTORS_FILE: True, SCALES_FILE: is_int8, BIASES_FILE: is_int8 and item_bias, NORMS_FILE: cosine}
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
            stored, files[SCALES_FILE][block] = quantize_rows(rows[:, :width])
        if BIASES_FILE in files:
            files[BIASES_FILE][block] = rows[:, width]
        if NORMS_FILE in files:
            files[NORMS_FILE][block] = inverse_norms(stored.float())
        files[VECTORS_FILE][block] = stored
    for file in files.values():
        file.flush()


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to whole multiples of a scale of its own.

    Of several scales near the least that keeps the row within ±127, which round a row's numbers differently, the one of
    the least squared error is taken; then it is fitted to the rounded numbers by least squares. Against the least scale
    alone, what a top list of the rows loses is a seventh less (see docs/log.md).

    Args:
        rows: float32 ``[n, D]``.

    Returns:
        int8 ``[n, D]`` and scales, float32 ``[n]``: ``numbers · scale`` is near ``rows``.
    """
    parts = [_quantized(part) for part in rows.split(_CACHED_ROWS)]
    return torch.cat([numbers for numbers, _ in parts]), torch.cat([scales for _, scales in parts])


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(dim=1)
    rows = rows / torch.where(largest > 0, largest, torch.ones_like(largest)).unsqueeze(1)
    peaks, scales, least = torch.ones_like(largest), torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for peak in _PEAKS:
        rounded = (rows * peak).round_()
        fitted = (rows * rounded).sum(1) / rounded.square().sum(1).clamp(min=1.0)
        error = rounded.mul_(fitted.unsqueeze(1)).sub_(rows).square_().sum(1)
        better = error < least
        peaks, scales, least = peaks.where(~better, peak), fitted.where(better, scales), error.where(better, least)
    return (rows * peaks.unsqueeze(1)).round_().to(torch.int8), scales * largest


def inverse_norms(rows: Tensor) -> Tensor:
    """Give 1 / |row|, ``[n]``, as `torch.nn.functional.normalize` would divide."""
    return rows.norm(dim=1).clamp(min=_MIN_NORM).reciprocal()


def read_items(folder: Path) -> Tensor:
    """Read a table back as the float32 rows ``[V, Q]`` that it stands for."""
    rows = torch.from_numpy(np.load(folder / VECTORS_FILE)).float()
    if (folder / SCALES_FILE).exists():
        rows *= torch.from_numpy(np.load(folder / SCALES_FILE)).unsqueeze(1)
    if (folder / BIASES_FILE).exists():
        rows = torch.cat([rows, torch.from_numpy(np.load(folder / BIASES_FILE)).unsqueeze(1)], dim=1)
    return rows


def _blocks(item_vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, item_vectors.size(0), _BLOCK_ROWS):
        yield start, item_vectors[start : start + _BLOCK_ROWS].float()
