"""Telling one model from another without reading all of it."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

_SMALL = 16 * 1024**2
"""Files up to this size are read whole."""
_SAMPLES = 256
_SAMPLE_BYTES = 4096


def fingerprint(directory: Path, *others: object) -> str:
    """A digest of a model's files and of what else decides what it computes.

    Of a large file it takes the size, the first megabyte and 256 samples of 4 KiB, evenly spread: a file that
    was pruned, trained or converted differs in nearly all of them.

    Args:
        directory: the model's.
        *others: whatever else, by its `repr`.

    Returns:
        32 hexadecimal digits.
    """
    digest = blake2b(repr(others).encode(), digest_size=16)
    for path in sorted(path for path in directory.iterdir() if path.is_file() and path.name[0] != "."):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _SMALL:
                digest.update(file.read())
                continue
            digest.update(file.read(1024**2))
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
