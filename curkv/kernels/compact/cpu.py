"""Moving kept tokens to the front of a head's pages, with Numba."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import kernel
from curkv.kernels.cpu.memory import INT32, address, array
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments
from curkv.kernels.pages import Pages


def compact(pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Move tokens of each row, with everything a page holds about them; see `reference.compact`.

    What a page holds of a token is a multiple of four bytes in each of its arrays.
    """
    rows = [x.contiguous() for x in (source, target, indices, counts)]
    page_size, arrays = pages.page_size, pages.arrays.values()
    words = [(address(x, x.dtype), x.stride(0) * x.itemsize // (4 * page_size)) for x in arrays]
    launch(
        _worker(), len(counts),
        *(address(x, torch.int32) for x in rows), source.shape[1], indices.shape[1], page_size, len(words),
        *(number for pair in words for number in pair),
    )  # fmt: skip


@functools.cache
def _worker() -> int:
    def work(arguments: int, row: int) -> None:
        source, target, indices, counts, max_pages, max_kept, page_size, arrays = read_arguments(arguments, 8)
        for i in range(arrays):
            storage, words = read_arguments(arguments + 8 * (8 + 2 * i), 2)
            pages, kept = 4 * row * max_pages, 4 * row * max_kept
            _move_row(
                storage, page_size, words, source + pages, target + pages, max_pages, indices + kept,
                array(INT32, counts, row + 1)[row],
            )  # fmt: skip

    return compile_worker(work)


@kernel
def _move_row(
    storage: int, page_size: int, words: int, source: int, target: int, max_pages: int, indices: int,
    count: int,
) -> None:  # fmt: skip
    """Move `count` tokens of one row in one array of int32 [num_pages, page_size, words].

    Unsigned, for a signed division costs as much as a token.
    """
    size = np.uint32(page_size)
    from_pages, to_pages = array(INT32, source, max_pages), array(INT32, target, max_pages)
    kept = array(INT32, indices, count)
    for i in range(np.uint32(count)):
        index = np.uint32(kept[i])
        from_page, from_slot = from_pages[index // size], index % size
        to_page, to_slot = to_pages[i // size], i % size
        if from_page != to_page or from_slot != to_slot:
            read = array(INT32, storage + 4 * words * (np.int64(from_page) * page_size + from_slot), words)
            write = array(INT32, storage + 4 * words * (np.int64(to_page) * page_size + to_slot), words)
            for word in range(words):
                write[word] = read[word]
