"""Whether a file holds the tensors that its configuration speaks of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from curkv.models.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

_PARAMETER = re.compile(r"(model\.layers\.\d+)\..+\.(weight|bias)")


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
