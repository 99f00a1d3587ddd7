"""Where Numba keeps compiled kernels: outside the sources, one folder per state of them.

Numba notices that the file of a kernel has changed but not that a function from another file, which was
compiled into it, has. A folder named after the content of all kernel sources cannot go stale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryFile


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


def check() -> None:
    """Makes the folder, as what compiles would, but with an error that says what to do.

    Raises:
        OSError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "set XDG_CACHE_HOME or NUMBA_CACHE_DIR to a directory that can be written"
        message = f"cannot keep compiled kernels ({error.strerror}), {advice}"
        raise OSError(error.errno, message, str(folder)) from error


def is_empty() -> bool:
    """Whether nothing has been compiled yet."""
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    return not folder.exists() or not any(folder.iterdir())


def drop() -> None:
    """Forgets all compiled kernels."""
    shutil.rmtree(os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)
