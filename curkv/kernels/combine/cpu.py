"""What the experts of each token have made of it, added up on CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.memory import FLOAT32, address, floats, load_int64, load_scalar
from curkv.kernels.cpu.workers import compile_worker, empty, launch, read_arguments
from curkv.kernels.silu_mul.cpu import exp

PART_SIZE = 1 << 13
"""Values that a thread makes; fewer are not worth a second thread."""


def combine(
    rows: Tensor, places: Tensor, shares: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """See `reference.combine`; float32, contiguous."""
    (count, chosen), width = places.shape, rows.shape[1]
    out = empty(count, width)
    at_once = max(1, PART_SIZE // max(width, 1))
    beside = (0 if side is None else address(side, torch.float32) for side in (shared, gate))
    launch(
        _worker(), -(-count // at_once), address(rows, torch.float32), address(places, torch.int64),
        address(shares, torch.float32), *beside, out.data_ptr(), count, chosen, width, at_once,
    )  # fmt: skip
    return out


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        rows, places, shares, shared, gate, out, count, chosen, width, at_once = read_arguments(arguments, 10)
        for token in range(part * at_once, min(count, (part + 1) * at_once)):
            target = floats(out + 4 * token * width, width)
            target[:] = 0
            for i in range(token * chosen, (token + 1) * chosen):
                source = floats(rows + 4 * load_int64(places + 8 * i) * width, width)
                share = load_scalar(FLOAT32, shares + 4 * i)
                for column in range(width):
                    target[column] += share * source[column]
            if shared:
                source, share = floats(shared + 4 * token * width, width), np.float32(1)
                if gate:
                    share = share / (share + exp(-load_scalar(FLOAT32, gate + 4 * token)))
                for column in range(width):
                    target[column] += share * source[column]

    return compile_worker(work)
