"""What a server asks of the interpreter and the C library under it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_KEPT, _LARGEST_KEPT = 64 << 20, 32 << 20
"""Bytes that are freed at the end of the heap and not given back; the largest single one, glibc's limit."""
_MADV_DONTNEED = 4
_MAPS = Path("/proc/self/maps")


def share_heap() -> None:
    """Has all threads allocate from one heap: what loading has freed, the engine uses."""
    _set(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Gives back the memory that loading has freed."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Has a step use the memory that the one before freed: new pages take a twentieth of a prefill."""
    _set(_M_TRIM_THRESHOLD, _MOST_KEPT)
    _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def pause_collector() -> None:
    """Has no garbage looked for while modules are imported and a model is loaded, which leave hardly any.

    They make 300,000 objects, and the collector would look at all of them several times: half a second.
    """
    gc.disable()


def spare_collector() -> None:
    """Takes what there is out of the garbage collector's view, and has it look at what comes from then on.

    A look at all that a start has made takes a quarter of a second, in which nobody else may run, and a
    request of many small values is enough to have the collector take one.
    """
    gc.freeze()
    gc.enable()


def _set(option: int, value: int) -> None:
    """Sets an option of malloc's, where it is glibc's."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(option, value)


def unmap_code() -> None:
    """Lets go of the code that loading has run, compilers above all; what is run again is mapped again."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or not _MAPS.exists():
        return
    for line in _MAPS.read_text().splitlines():
        place, rights, _offset, _device, _inode, *path = line.split(maxsplit=5)
        if rights == "r-xp" and path and Path(path[0]).is_file():  # from where it can be read again
            start, end = (int(bound, 16) for bound in place.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
