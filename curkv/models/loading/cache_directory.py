"""Converted models in the user's cache directory, each made once and appearing whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Part of every directory's name: raise it when a conversion changes, so that old results are not reused.
CONVERSION_VERSION = 1


def models_directory() -> Path:
    """Returns `$XDG_CACHE_HOME/curkv/models` (default `~/.cache/curkv/models`)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root) / "curkv/models" if root else Path.home() / ".cache/curkv/models"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Returns the cached directory of `name`, building it first if it does not exist.

    The build works in a directory beside the final one, which is renamed when complete; processes that want
    the same model wait for the first. What an interrupted build left is removed, at once or by the next one.

    Args:
        name: Key of the model; safe as a file name.
        build: Fills the empty directory it is given.
    """
    final = models_directory() / f"{name}-v{CONVERSION_VERSION}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final.with_name(f".{final.name}.lock")):
        if not final.is_dir():
            _build(final, build)
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    try:
        build(partial)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel releases even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
