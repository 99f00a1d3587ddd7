"""The tensors of a model directory, and whether they are those that its configuration speaks of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from curkv.models.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

_PARAMETER = re.compile(r"(model\.layers\.\d+)\..+\.(weight|bias)")


class TensorFiles(Protocol):
    """The tensors of a model directory.

    Attributes:
        mapped: What is read is a view of the file.
    """

    mapped: bool

    @property
    def names(self) -> list[str]:
        """Every tensor."""

    @property
    def paths(self) -> list[Path]:
        """The files."""

    def place(self, name: str) -> tuple[Path, str]:
        """Returns the file that holds a tensor, or should, and the tensor's name in it."""

    def read(self, name: str) -> Tensor:
        """Reads a tensor, in the type that it is stored in if that is one of numbers."""

    def unread(self, name: str) -> Tensor:
        """Returns what `read` does, or `StoredRows`, of which values are made when they are needed."""

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape of each tensor, and its dtype in the words of safetensors, such as `BF16`."""


def check_shapes(found: Shapes, expected: Shapes, place: Callable[[str], tuple[Path, str]]) -> None:
    """Raises ModelError unless a checkpoint holds what a model of its configuration consists of.

    Args:
        found: Shape of each tensor of the checkpoint.
        expected: Shape of each that the model needs.
        place: The file that holds a tensor, or should, and the tensor's name in it.
    """
    for name, shape in expected.items():
        file, there = place(name)
        if name not in found:
            raise ModelError(f"{file} has no tensor {there}")
        if found[name] != shape:
            raise ModelError(
                f"{file}: {there} has the shape {list(found[name])}, but {list(shape)} by the configuration"
            )
    layers = {match[1] for name in expected if (match := _PARAMETER.fullmatch(name))}
    for name in found:
        match = _PARAMETER.fullmatch(name)
        if match and match[1] in layers and name not in expected:
            file, there = place(name)
            raise ModelError(f"{file}: the model of the configuration has no tensor {there}")


def not_finite(file: Path, there: str) -> ModelError:
    """Returns the error that names a tensor with NaN or infinity in it."""
    return ModelError(f"{file}: {there} holds NaN or infinity; the file is damaged or the model diverged")
