"""How this process's memory is held: freed pieces serve again instead of going back at once."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_NEVER = 2**31 - 1
_LARGEST_KEPT = 32 << 20  # glibc's own bound; larger pieces are mapped and given back
_CHOSEN_BY_THE_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next piece.

    By default it gives back whatever lies at a heap's end, and the next training step or merged
    block pays for new pages: up to a tenth of a step, half of a merged block. Each thread keeps
    its own heaps, of 64 MB at most, and gives back whole ones: with one heap for all, nothing was
    given back, but two trainings side by side took 4 % longer. Does nothing with another C
    library, or where the user's variables say how.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
