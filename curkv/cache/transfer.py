"""What heads hold, out of pages and into pages: the tokens of one head after those of another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import Ids


def copy_out(kv: PageManager, table: Ids, lengths: NDArray[np.int32]) -> dict[str, Tensor]:
    """Copies what heads hold.

    Args:
        kv: the cache.
        table: int32 [L, H, pages].
        lengths: int32 [L, H], tokens of each head.

    Returns:
        The pages' arrays by name, on the host, each [tokens of all heads, ...].
    """
    places = _places(kv, table, lengths)
    return {name: array.flatten(0, 1)[places].cpu() for name, array in kv.pages.arrays.items()}


def copy_in(kv: PageManager, lengths: NDArray[np.int32], arrays: Mapping[str, Tensor]) -> Ids:
    """Puts what heads held into fresh pages.

    Args:
        kv: the cache.
        lengths: int32 [L, H].
        arrays: as `copy_out` gives them.

    Returns:
        int32 [L, H, pages], pages of which the caller is the owner; entries past a head's last one mean
        nothing.

    Raises:
        OutOfPages: there are too few; nothing is changed.
    """
    counts = -(-lengths // kv.layout.page_size)
    table = np.zeros((*lengths.shape, int(counts.max(initial=0))), dtype=np.int32)
    table[np.arange(table.shape[-1]) < counts[..., None]] = kv.take(int(counts.sum()))
    places = _places(kv, table, lengths)
    for name, array in kv.pages.arrays.items():
        array.flatten(0, 1)[places] = arrays[name].to(array.device)
    return table


def _places(kv: PageManager, table: Ids, lengths: NDArray[np.int32]) -> Tensor:
    """int64 [tokens of all heads], where they lie among the tokens of all pages."""
    size, flat = kv.layout.page_size, lengths.reshape(-1).astype(np.int64)
    head = np.arange(len(flat)).repeat(flat)
    token = np.arange(len(head)) - (flat.cumsum() - flat).repeat(flat)
    pages = table.reshape(len(flat), -1)[head, token // size].astype(np.int64)
    return torch.from_numpy(pages * size + token % size).to(kv.device)
