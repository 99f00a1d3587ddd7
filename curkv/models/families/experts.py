"""Experts as checkpoints store them: a tensor for each, or one for all of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from curkv.models.families.base import Piece

Shapes = Mapping[str, tuple[int, ...]]

GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
"""The projections that a stack holds, one below the other."""


def renamed(found: Shapes, old: str, new: str) -> dict[str, Piece]:
    """Tensors with a part of their names replaced."""
    return {
        name.replace(old, new): Piece((name,), shape, _whole) for name, shape in found.items() if old in name
    }


def unstacked(found: Shapes, ending: str, block: str, parts: tuple[str, ...]) -> dict[str, Piece]:
    """The projections of each expert, of stacks [experts, rows, columns].

    Args:
        found: Shape of each tensor of the checkpoint.
        ending: How the names of stacks end.
        block: What stands in the place of that before `.experts`.
        parts: The projections that a stack holds, of equally many rows.
    """
    pieces = {}
    for name, shape in found.items():
        if name.endswith(ending) and len(shape) == 3:
            experts, rows, columns = shape
            size, prefix = rows // len(parts), name.removesuffix(ending) + block
            for expert in range(experts):
                for i, part in enumerate(parts):
                    take = partial(_rows, expert=expert, start=i * size, end=(i + 1) * size)
                    pieces[f"{prefix}.experts.{expert}.{part}.weight"] = Piece((name,), (size, columns), take)
    return pieces


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _rows(stack: Tensor, *, expert: int, start: int, end: int) -> Tensor:
    return stack[expert, start:end]
