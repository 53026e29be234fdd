"""Map NumPy files into memory, in TorchScript: an exported model opens its item table by itself, in Python and in C++.

Linux refuses the private mapping that ``torch.from_file`` makes of a file larger than memory and swap together (unless
``vm.overcommit_memory`` is 1), as it could be written to. `map_read_only`, in Python alone, maps files of any size.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def map_read_only(path: Path) -> Tensor:
    """Map an array that ``numpy.save`` wrote, without reading it; see `map_array`. It must not be written to.

    Raises:
        OSError, ValueError: the file is missing, shorter than it says, or of another kind.
    """
    array = np.lib.format.open_memmap(path, mode="r")  # which reads this format alone, and no objects
    if array.dtype not in (np.float32, np.float16, np.int8) or not array.flags.c_contiguous:
        raise ValueError(f"{path} holds {array.dtype}, not float32, float16 or int8 in C order")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def map_array(path: str) -> Tensor:
    """Map an array that ``numpy.save`` wrote, without reading it.

    Pages are read from the disk when they are first touched, and processes that map the same file share them. Nothing that
    is done to the tensor reaches the file.

    Args:
        path: an ``.npy`` file of float32, float16 or int8, in C order and little-endian.

    Returns:
        The array, with its shape and dtype, on the CPU.

    Raises:
        RuntimeError: the file is missing, shorter than it says, or of another kind.
    """
    # Magic (6 bytes), version (2), length of the header (2), header: a Python dictionary as text, padded to 64 bytes.
    prefix = torch.from_file(path, False, 10, dtype=torch.uint8)
    start = 10 + int(prefix[8].item()) + 256 * int(prefix[9].item())
    codes: list[int] = torch.from_file(path, False, start, dtype=torch.uint8)[10:].to(torch.int64).tolist()
    header = "".join([chr(code) for code in codes])
    if int(prefix[6].item()) != 1 or "'fortran_order': False" not in header:
        raise RuntimeError(path + " is no NumPy file of version 1 in C order")
    if "'<f4'" in header:
        dtype, item_bytes = torch.float32, 4
    elif "'<f2'" in header:
        dtype, item_bytes = torch.float16, 2
    elif "'|i1'" in header:
        dtype, item_bytes = torch.int8, 1
    else:
        raise RuntimeError(path + " is not of float32, float16 or int8")
    shape = [int(size) for size in header.split("(")[1].split(")")[0].strip(",").split(",")]
    num_elements = 1
    for size in shape:
        num_elements *= size
    before = start // item_bytes
    return torch.from_file(path, False, before + num_elements, dtype=dtype)[before:].view(shape)
