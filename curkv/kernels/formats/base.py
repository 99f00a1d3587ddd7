"""What a format of the KV cache is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curkv.kernels.formats.cpu.base import CPUVectors

P = TypeVar("P")


@dataclass(frozen=True)
class Array:
    """What a token has in one array of a format.

    Attributes:
        shape: Of one token's entry; () for a number.
        dtype: Of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one token's entry, a multiple of 4, so that tokens move as 32-bit words."""
        return math.prod(self.shape) * self.dtype.itemsize


class VectorFormat(ABC):
    """How vectors, keys or values, lie in memory. A token is one entry of each array.

    Here are the format's arrays and, in torch, what encoding and decoding mean; the reference kernels use
    these two. What the other backends need of it lies in `cpu/` and in `triton.py`.

    Attributes:
        name: Of the format of a cache whose keys and values both lie like this.
        multiple: head_dim must be a multiple of this.
        devices: Kinds of devices whose kernels read and write it.
    """

    name: str
    multiple: int = 1
    devices: tuple[str, ...] = ("cpu", "cuda")

    @abstractmethod
    def arrays(self, head_dim: int) -> dict[str, Array]:
        """The arrays by name, that of the most bytes first."""

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rounds vectors, float32 [..., head_dim], to entries [..., *shape] of each array."""

    @abstractmethod
    def decode(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Reads entries [..., *shape] of each array as vectors, float32 [..., head_dim]."""

    def token_bytes(self, head_dim: int) -> int:
        """Bytes of a vector in all arrays."""
        return sum(array.nbytes for array in self.arrays(head_dim).values())

    def on_cpu(self) -> CPUVectors:
        """What Numba's kernels need of the format: `primitives(self)` of the module of its name in `cpu/`."""
        folder, _, module = type(self).__module__.rpartition(".")
        found: CPUVectors = import_module(f"{folder}.cpu.{module}").primitives(self)
        return found


@dataclass(frozen=True)
class Store:
    """The keys, or the values, of every page.

    Attributes:
        format: How they lie in memory.
        head_dim: Channels of a vector.
        arrays: [num_pages, page_size, *shape] each, by the format's names.
    """

    format: VectorFormat
    head_dim: int
    arrays: dict[str, Tensor]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return next(iter(self.arrays.values())).shape[1]

    def read(self, *index: Tensor) -> Tensor:
        """Decodes vectors.

        Args:
            index: Of the arrays' first dimension, or of the first two: pages, or tokens in pages.

        Returns:
            float32 [..., head_dim], a copy.
        """
        return self.format.decode({name: array[index] for name, array in self.arrays.items()})

    def write(self, x: Tensor, *index: Tensor) -> None:
        """Encodes vectors.

        Args:
            x: float32 [..., head_dim].
            index: As in `read`.
        """
        for name, entries in self.format.encode(x).items():
            self.arrays[name][index] = entries

    @cached_property
    def addresses(self) -> Tensor:
        """int64 [arrays], where the arrays lie.

        Raises:
            TypeError: An array is not contiguous or not what the format says.
        """
        for name, array in self.format.arrays(self.head_dim).items():
            held = self.arrays[name]
            if held.dtype != array.dtype or held.shape[2:] != array.shape or not held.is_contiguous():
                raise TypeError(
                    f"array {name!r} of {self.format.name}: expected contiguous {array.dtype} "
                    f"[..., {', '.join(map(str, array.shape))}], got {held.dtype} {list(held.shape)}"
                )
        return torch.tensor([self.arrays[name].data_ptr() for name in self.format.arrays(self.head_dim)])


@dataclass(frozen=True)
class KVFormat:
    """How a cache holds keys and values.

    Attributes:
        name: As `--kv-dtype` takes it.
        keys, values: How each lie in memory.
    """

    name: str
    keys: VectorFormat
    values: VectorFormat

    @property
    def multiple(self) -> int:
        """head_dim must be a multiple of this."""
        return math.lcm(self.keys.multiple, self.values.multiple)

    @property
    def devices(self) -> tuple[str, ...]:
        """Kinds of devices whose kernels read and write it."""
        return tuple(kind for kind in self.keys.devices if kind in self.values.devices)

    def token_bytes(self, head_dim: int) -> int:
        """Bytes of a key and a value."""
        return self.keys.token_bytes(head_dim) + self.values.token_bytes(head_dim)

    def move(
        self,
        compact: Callable[[P, Tensor, Tensor, Tensor, Tensor], None],
        pages: P,
        source: Tensor,
        target: Tensor,
        indices: Tensor,
        counts: Tensor,
    ) -> None:
        """Moves tokens, for an eviction, a fork or a copy of a page: a token's entries, bit by bit.

        A format in which tokens share something, as a scale per channel, does more here.

        Args:
            compact: The kernel that moves entries.
            pages, source, target, indices, counts: As it takes them.
        """
        compact(pages, source, target, indices, counts)
