"""How this process's memory is held: freed pieces serve again instead of going back at once."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_NEVER = 2**31 - 1
_LARGEST_KEPT = 32 << 20  # glibc's own bound; larger pieces are mapped and given back
_CHOSEN_BY_THE_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next piece, in one heap for all threads.

    By default it gives back whatever lies at the heap's end, and the next training step or merged
    block pays for new pages: up to a tenth of a step, half of a merged block. With one heap a
    thread's freed memory serves the others, so the process holds the peak of all threads, not the
    sum of their peaks. Does nothing with another C library, or where the user's variables say how.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
