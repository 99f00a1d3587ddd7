"""Picking rows of a matrix on CPU, as a launch that can be recorded."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from curkv.kernels.cpu.memory import address, floats, load_int64, row_address
from curkv.kernels.cpu.workers import compile_worker, empty, launch, read_arguments

PART_SIZE = 1 << 15
"""Values that a thread copies; fewer are not worth a second thread."""


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """See `reference.gather_rows`; float32, rows contiguous."""
    count, width = len(rows), source.shape[1]
    out = empty(count, width)
    at_once = max(1, PART_SIZE // max(width, 1))
    places = row_address(source, torch.float32), source.stride(0), address(rows, torch.int64), out.data_ptr()
    launch(_worker(), -(-count // at_once), *places, count, width, at_once)
    return out


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        source, stride, rows, out, count, width, at_once = read_arguments(arguments, 7)
        for row in range(part * at_once, min(count, (part + 1) * at_once)):
            values = floats(source + 4 * load_int64(rows + 8 * row) * stride, width)
            target = floats(out + 4 * row * width, width)
            for i in range(width):
                target[i] = values[i]

    return compile_worker(work)
