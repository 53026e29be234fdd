"""Keep the memory of a long job, or of a training, to what it holds.

Batches come and go in several threads, and the C library keeps what they freed: between what is still in use it becomes
pieces too small for the next batch, which gets new memory, so a process grows though it holds no more. Mapping large tensors
alone would give everything back at once, but every batch would then wait for fresh pages: jobs took twice as long.
"""

import ctypes
import time
from collections.abc import Callable

SECONDS_BETWEEN = 2.0


def give_back_freed() -> None:
    """Give what this process has freed back to the system, in some 10 ms; nothing happens where the C library is not glibc."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class FreedMemory:
    """What a process has freed; call it now and then, and it goes back to the system every `SECONDS_BETWEEN`."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Give it back if it is time."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN:
            give_back_freed()
            self._last = time.monotonic()
