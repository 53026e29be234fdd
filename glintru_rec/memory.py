"""Keep the memory of a long job, or of a training, to what it holds.

Batches come and go in several threads, and the C library keeps what they freed: between what is still in use it becomes
pieces too small for the next batch, which gets new memory, so a process grows though it holds no more. Mapping large tensors
alone would give everything back at once, but every batch would then wait for fresh pages: jobs took twice as long.
"""

import ctypes
import time
from collections.abc import Callable

import pyarrow as pa

SECONDS_BETWEEN = 2.0
# Of glibc alone.
_MALLOC_TRIM: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed() -> None:
    """Give what torch, numpy and pyarrow have freed back to the system, in some 10 ms; pyarrow's alone without glibc."""
    pa.default_memory_pool().release_unused()
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


class FreedMemory:
    """What a process has freed in C; call it now and then, and it goes back to the system every `SECONDS_BETWEEN`.

    Nothing happens where that library has no ``malloc_trim``, which is glibc's.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Give it back if it is time."""
        if _MALLOC_TRIM is not None and time.monotonic() - self._last >= SECONDS_BETWEEN:
            _MALLOC_TRIM(0)
            self._last = time.monotonic()
