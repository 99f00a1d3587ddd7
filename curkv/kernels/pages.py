"""The memory that every cache kernel reads and writes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.formats.base import KVFormat, Store, VectorFormat

SIDES = {
    "position": torch.int32,
    "k_sq": torch.float32,
    "v_sq": torch.float32,
    "attention": torch.float32,
}
"""What a page holds of each token besides its key and value, see `Pages`."""
ALIGNMENT = 4096  # of a page of the machine's memory, and of lines of its caches
SIDE_BYTES = sum(dtype.itemsize for dtype in SIDES.values())


@dataclass(frozen=True, slots=True)
class Pages:
    """The page pool's tensors.

    A page holds `page_size` consecutive kept tokens of exactly one (sequence, layer, KV head).

    Attributes:
        k: Keys after RoPE, in a format of the cache.
        v: Values.
        position: int32 [num_pages, page_size], logical position of the token in its sequence.
        k_sq: float32 [num_pages, page_size], squared norm of the key before it was rounded to the format.
        v_sq: float32 [num_pages, page_size], squared norm of the value before rounding.
        attention: float32 [num_pages, page_size], attention probability received so far, 0 when stored.
    """

    k: Store
    v: Store
    position: Tensor
    k_sq: Tensor
    v_sq: Tensor
    attention: Tensor

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.position.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a key or value."""
        return self.k.head_dim

    @property
    def arrays(self) -> dict[str, Tensor]:
        """Every tensor there is, by name; a token is one entry of each."""
        stored = {
            f"{kind}.{name}": array
            for kind, store in (("k", self.k), ("v", self.v))
            for name, array in store.arrays.items()
        }
        return stored | {name: getattr(self, name) for name in SIDES}


def allocate(
    format: KVFormat, num_pages: int, page_size: int, head_dim: int, device: str | torch.device = "cpu"
) -> Pages:
    """Allocates pages without touching their memory.

    Args:
        format: Of keys and values.
        num_pages: Pages.
        page_size: Tokens per page.
        head_dim: Channels of a key or value.
        device: Where the memory lies.

    Returns:
        Pages of undefined content.
    """
    slots = (num_pages, page_size)

    def store(vectors: VectorFormat) -> Store:
        arrays = {
            name: _memory((*slots, *array.shape), array.dtype, device)
            for name, array in vectors.arrays(head_dim).items()
        }
        return Store(vectors, head_dim, arrays)

    sides = {name: _memory(slots, dtype, device) for name, dtype in SIDES.items()}
    return Pages(store(format.keys), store(format.values), **sides)


def longest(lengths: Tensor) -> int:
    """Tokens of the longest head, 0 if there is none; reads the lengths, so that a GPU is waited for."""
    return int(lengths.max()) if lengths.numel() else 0


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Allocates uninitialised memory; on the host by numpy, which asks for huge pages: fewer TLB misses.

    It is aligned, so that no page of the pool reaches into a line of the caches that is fetched for another.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.int8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
