"""Writing a safetensors file tensor by tensor, so that a conversion never holds a whole model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}  # numpy has no bfloat16: its bits
DATA_ALIGNMENT = 64  # bytes; a SIMD register, so that mapped tensors are aligned


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to be written.

    Attributes:
        name: Its key in the file.
        shape: Its shape.
        dtype: float32, float16, or uint16 for the bits of bfloat16.
        read: Produces the array when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[TensorEntry], task: str = "Converting weights") -> None:
    """Writes the tensors in the given order (format: https://github.com/huggingface/safetensors).

    Args:
        path: The file.
        entries: The tensors.
        task: Shown beside the progress bar.
    """
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry in tqdm(entries, desc=task, unit=" tensors", leave=False):
            array = entry.read()
            if array.shape != entry.shape or array.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name}: expected {entry.shape} {entry.dtype}, read {array.shape} {array.dtype}"
                )
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def _header(entries: Sequence[TensorEntry]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype.name],
            "shape": entry.shape,
            "data_offsets": (offset, offset + entry.nbytes),
        }
        offset += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
