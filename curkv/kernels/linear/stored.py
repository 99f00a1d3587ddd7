"""Weights as a file holds them, of which values are made when and as far as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten

Bytes = npt.NDArray[np.uint8]


class Grids(NamedTuple):
    """A weight [N, K] of 4 bits: about its integers times its steps plus its lowest values.

    Attributes:
        integers: uint8 [N, K up to a multiple of 32], 0 to 15.
        steps: float16 [N, groups of 32 columns].
        lows: float16 [N, groups].
    """

    integers: Tensor
    steps: Tensor
    lows: Tensor


class Stretch(NamedTuple):
    """Some rows of a weight.

    Attributes:
        stored: uint8 [rows, bytes of a row].
        decode: Makes float32 [rows, columns] of such.
        grids: Tells what they are if they have been rounded to 4 bits, without rounding them again; None:
            they have not.
    """

    stored: Bytes
    decode: Callable[[Bytes], Tensor]
    grids: Callable[[Bytes], Grids] | None


class StoredRows(Tensor):
    """A float32 matrix without values.

    Some of its rows are such a matrix, and so are several, one below the other. Whatever else is computed
    with it is given a tensor of its values.

    Attributes:
        stretches: What it consists of.
    """

    stretches: Sequence[Stretch]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stretches: Sequence[Stretch], columns: int) -> StoredRows:
        """Takes stretches, one below the other, and how many columns they have."""
        rows = sum(len(stretch.stored) for stretch in stretches)
        made: StoredRows = Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=torch.float32)
        made.stretches = stretches
        return made

    def values(self) -> Tensor:
        """Returns a tensor of its values."""
        return _below([stretch.decode(stretch.stored) for stretch in self.stretches])

    def grids(self) -> Grids | None:
        """Returns what it is in 4 bits, if it has been rounded to them."""
        found = []
        for stretch in self.stretches:
            if stretch.grids is None:
                return None
            found.append(stretch.grids(stretch.stored))
        return Grids(*map(_below, zip(*found, strict=True)))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Takes rows and puts matrices below each other; computes all else over values."""
        if func is aten.slice.Tensor and args[1:2] == (0,):
            return args[0]._taken(slice(*args[2:]))
        if func is aten.cat.default and len(args) == 1 and all(isinstance(x, StoredRows) for x in args[0]):
            return cls([stretch for x in args[0] for stretch in x.stretches], args[0][0].shape[1])
        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def _taken(self, which: slice) -> StoredRows:
        start, stop, step = which.indices(len(self))
        taken = []
        for stretch in self.stretches:
            count = len(stretch.stored)
            taken.append(stretch._replace(stored=stretch.stored[start : max(0, min(stop, count)) : step]))
            start, stop = start - count if start >= count else (start - count) % step, stop - count
        return StoredRows([stretch for stretch in taken if len(stretch.stored)] or taken[:1], self.shape[1])


def _below(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def values(weight: Any) -> Any:
    """Returns a tensor of the values of `StoredRows`, and anything else as it is."""
    return weight.values() if isinstance(weight, StoredRows) else weight
