"""What a server asks of the C library under it."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8


def share_heap() -> None:
    """Has all threads allocate from one heap: what loading has freed, the engine uses."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Gives back the memory that loading has freed."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
