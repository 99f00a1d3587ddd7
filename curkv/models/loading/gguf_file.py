"""The header of a GGUF file: metadata by key, and where each tensor lies.

The `gguf` package reads it as well, one array per string of the vocabulary: 12 s for Gemma's 262,144 tokens,
where this takes a third of one. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from curkv.models.errors import ModelError, ModelNotFound, UnsupportedModel
from curkv.models.loading.gguf_blocks import dequantise

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), (f"<{code}" for code in "BbHhIif?Qqd"), strict=True)
)
"""Struct codes of the types of values, by their numbers."""
_PIECE = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a GGUF file, as yet unread.

    Attributes:
        name: In the file.
        path: The file.
        kind: How its blocks are quantised.
        shape: As in torch: rows first.
        offset: Of its first byte in the file.
    """

    name: str
    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    @property
    def n_elements(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    def read(self) -> npt.NDArray[np.float32]:
        """Returns its values. The mapping is gone when it returns, and does not count as memory any more."""
        return dequantise(self.blocks(), self.kind, self.shape)

    def blocks(self) -> npt.NDArray[np.uint8]:
        """Returns its bytes by row, uint8 [..., bytes of a row], mapped."""
        block, size = GGML_QUANT_SIZES[self.kind]
        shape = *self.shape[:-1], self.shape[-1] // block * size
        return np.memmap(self.path, np.uint8, "r", self.offset, shape)


class GGUFFile:
    """A GGUF model: metadata of its first file by key, and the tensors of all its files by name.

    Attributes:
        paths: The file, or all pieces of one that was split, in order.
        architecture: What its metadata calls it.
        tensors: By name.

    Raises:
        ModelNotFound: A piece is missing.
        ModelError: A file is damaged.
    """

    def __init__(self, path: Path):
        self.paths = split_pieces(path)
        headers = [_Header(piece) for piece in self.paths]
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self.architecture = str(self.get("general.architecture"))
        self.tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
        count, expected = self.get("split.count", 1), self.get("split.tensors.count")
        if count > 1 and count != len(self.paths):
            raise ModelError(
                f"{path} is a piece of {count} (split.count), but not named like one, "
                f"...-00001-of-{count:05d}.gguf: the others cannot be found"
            )
        if count > 1 and expected is not None and expected != len(self.tensors):
            raise ModelError(
                f"the pieces of {path} hold {len(self.tensors)} tensors, {expected} by split.tensors.count"
            )

    @property
    def path(self) -> Path:
        """The first file."""
        return self.paths[0]

    @cached_property
    def keys(self) -> set[str]:
        """All keys under the architecture's prefix, without it."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a metadata key."""
        return self.metadata.get(key, default)

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key under the architecture's prefix."""
        return self.get(f"{self.architecture}.{key}", default)


def split_pieces(path: Path) -> list[Path]:
    """Returns all pieces of a split file, of which one is named, in order; or the file alone.

    Raises:
        ModelNotFound: One is missing.
    """
    match = _PIECE.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count, suffix = match.groups()
    found = [path.with_name(f"{stem}-{part:05d}-of-{count}{suffix}") for part in range(1, int(count) + 1)]
    if missing := [piece.name for piece in found if not piece.is_file()]:
        raise ModelNotFound(
            f"{path} is one of {int(count)} pieces; missing in {path.parent}: {', '.join(missing)}"
        )
    return found


class _Header:
    """What a GGUF file begins with."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
                self.metadata, self.tensors = self._read()
        except struct.error as error:
            raise ModelError(f"{path} is no readable GGUF file: it is cut off") from error
        except (ValueError, KeyError, RecursionError) as error:
            raise ModelError(f"{path} is no readable GGUF file: {error}") from error

    def _read(self) -> tuple[dict[str, Any], list[GGUFTensor]]:
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._take("<I")
        if version not in VERSIONS:
            other = "; it is written for big-endian machines" if version >= 1 << 16 else ""
            raise ValueError(f"its version is {version}, not 2 or 3{other}")
        num_tensors, num_keys = self._take("<Q"), self._take("<Q")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._take("<I"))
        described = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = self._at + -self._at % alignment
        return metadata, [self._placed(start, *tensor) for tensor in described]

    def _placed(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModel(f"{self._path}: {name} has the unknown type {kind}") from None
        tensor = GGUFTensor(name, self._path, known, shape, start + offset)
        if shape and shape[-1] % GGML_QUANT_SIZES[known][0]:
            raise ValueError(f"{name} has rows of {shape[-1]} values, no multiple of a block of {known.name}")
        if tensor.offset + tensor.nbytes > len(self._data):
            raise ValueError(
                f"it ends at byte {len(self._data)}, before the tensor {name} does; it is cut off"
            )
        return tensor

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._take("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._take("<Q") for _ in range(dimensions))
        return name, shape[::-1], self._take("<I"), self._take("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        of, count = self._take("<I"), self._take("<Q")
        if of in (_STRING, _ARRAY):
            if count > len(self._data):
                raise ValueError("an array is longer than the file")
            return [self._value(of) for _ in range(count)]
        dtype = np.dtype(_SCALARS[of])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

    def _string(self) -> str:
        return self._bytes(self._take("<Q")).decode("utf-8", errors="replace")

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _bytes(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise ValueError("it is cut off")
        self._at += count
        return found
