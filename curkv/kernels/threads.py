"""One pool of OpenMP threads for torch and for the Numba kernels.

torch's wheel carries a libgomp of its own. Numba's OpenMP layer asks for the system's by another name, so
that whoever imports torch first gets two pools, whose idle threads spin on the cores that the other one
needs. If the system's library is in the process before torch, both use it.
"""

from __future__ import annotations

import contextlib
import ctypes


def share_openmp() -> None:
    """Load the system's OpenMP library, if there is one. To be called before torch is imported."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgomp.so.1.0.0", mode=ctypes.RTLD_GLOBAL)
