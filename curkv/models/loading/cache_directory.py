"""Models in the user's cache directory, each made once and appearing whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from curkv.models.errors import ModelUnreachable

logger = logging.getLogger(__name__)

# Part of every directory's name: raise it when what is built changes, so that old results are not reused.
CONVERSION_VERSION = 2

_SIZES = ".sizes.json"
_NO_SPACE = os.strerror(errno.ENOSPC)


def cache_directory() -> Path:
    """Returns `$XDG_CACHE_HOME/curkv` (default `~/.cache/curkv`)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "curkv"


def models_directory() -> Path:
    """Returns where models are kept."""
    return cache_directory() / "models"


def build_once(name: str, build: Callable[[Path], None], root: Path | None = None) -> Path:
    """Returns the cached directory of `name`, building it first if it does not exist or has lost something.

    The build works in a directory beside the final one, which is renamed when complete; processes that want
    the same model wait for the first. What an interrupted build left is removed, at once or by the next one.

    Args:
        name: Key of the model; safe as a file name.
        build: Fills the empty directory it is given.
        root: Where to; the directory of models if not given.

    Raises:
        ModelUnreachable: The cache directory cannot be written, or has no room.
    """
    final = (root or models_directory()) / f"{name}-v{CONVERSION_VERSION}"
    if _is_whole(final):
        return final
    with _says_what_to_do(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(f".{final.name}.lock")):
            if not _is_whole(final):
                if final.exists():
                    logger.warning("%s is damaged: it is made anew", final)
                _build(final, build)
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    try:
        build(partial)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / _SIZES).write_text(json.dumps(sizes))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_whole(directory: Path) -> bool:
    """Whether a directory has every file that its build made, and all of it."""
    if not directory.is_dir():
        return False
    try:
        sizes = json.loads((directory / _SIZES).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError as error:
        return bool(error.filename == str(directory / _SIZES))  # it was made before sizes were noted
    except (OSError, ValueError):
        return False


@contextmanager
def _says_what_to_do(directory: Path) -> Iterator[None]:
    """Turns what a file system refuses into an error for the user."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            advice = "set XDG_CACHE_HOME to a directory that can be written"
            raise ModelUnreachable(f"cannot write to {directory} ({os.strerror(code)}): {advice}") from error
        if code in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE in str(
            error
        ):  # safetensors has an error of its own
            advice = "make room, or set XDG_CACHE_HOME to a directory that has some"
            raise ModelUnreachable(f"no space left in {directory} to make the model: {advice}") from error
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel releases even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
