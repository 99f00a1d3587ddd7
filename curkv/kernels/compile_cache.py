"""Where Numba keeps compiled kernels: outside the sources, one folder per state of them.

Numba notices that the file of a kernel has changed but not that a function from another file, which was
compiled into it, has. A folder named after the content of all kernel sources cannot go stale.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def configure() -> None:
    """Chooses the folder, unless NUMBA_CACHE_DIR does; to be called before any kernel is compiled."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = str(cache / "curkv" / "kernels" / digest.hexdigest()[:16])
    os.environ["NUMBA_CACHE_DIR"] = folder
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = folder
