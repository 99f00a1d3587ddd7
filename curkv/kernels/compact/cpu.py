"""Moving kept tokens to the front of a head's pages, with Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from curkv.kernels.pages import Pages


def compact(pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Move tokens of each row, with everything a page holds about them; see `reference.compact`."""
    arrays = (x if x.ndim == 3 else x.unsqueeze(-1) for x in pages.arrays.values())
    words = tuple(x.view(torch.int32).numpy() for x in arrays)
    _move(words, *(x.contiguous().numpy() for x in (source, target, indices, counts)))


@njit(parallel=True, nogil=True, cache=True)
def _move(storages: Any, source: Any, target: Any, indices: Any, counts: Any) -> None:
    """Move tokens in each of the arrays int32 [num_pages, page_size, words per token]."""
    for row in prange(len(counts)):
        for storage in storages:
            _move_row(storage, source[row], target[row], indices[row, : counts[row]])


@njit(nogil=True, cache=True)
def _move_row(storage: Any, source: Any, target: Any, indices: Any) -> None:
    """Move the tokens `indices` of one row; unsigned, for a signed division costs as much as a token."""
    page_size = np.uint32(storage.shape[1])
    for i in range(np.uint32(len(indices))):
        index = np.uint32(indices[i])
        from_page, from_slot = source[index // page_size], index % page_size
        to_page, to_slot = target[i // page_size], i % page_size
        if from_page != to_page or from_slot != to_slot:
            for word in range(storage.shape[2]):
                storage[to_page, to_slot, word] = storage[from_page, from_slot, word]
