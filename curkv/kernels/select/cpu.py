"""Choosing the tokens to keep, with Numba: a threshold is found digit by digit, nothing is sorted."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import kernel
from curkv.kernels.cpu.memory import BOOL, INT32, INT64, UINT32, address, array
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments

_DIGIT_BITS = 11
_SIGN = np.uint32(0x80000000)


def select(
    scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the highest-scoring tokens per head, or per layer with floors; see `reference.select`."""
    layers, heads, width = scores.shape
    rows = layers * heads
    groups, members = (rows, 1) if floor is None else (layers, heads)
    sure = torch.zeros(groups, members, dtype=torch.int32) if floor is None else floor.contiguous()
    scores, lengths, totals = scores.contiguous(), lengths.contiguous(), keep.reshape(groups, members).sum(1)
    kept = torch.zeros(rows, width, dtype=torch.bool)
    launch(
        _chooser(), groups,
        address(scores, torch.float32), address(lengths, torch.int32), address(totals, torch.int64),
        address(sure, torch.int32), kept.data_ptr(), members, width,
    )  # fmt: skip
    counts = torch.from_numpy(kept.numpy().sum(-1, dtype=np.int32))
    indices = torch.full((rows, width), -1, dtype=torch.int32)
    launch(_lister(), rows, kept.data_ptr(), width, indices.data_ptr())
    return indices.view(scores.shape), counts.view(layers, heads)


@functools.cache
def _chooser() -> int:
    def work(arguments: int, group: int) -> None:
        scores, lengths, totals, floor, kept, heads, width = read_arguments(arguments, 7)
        first, shape = group * heads, (heads, width)
        _choose(
            array(UINT32, scores + 4 * first * width, shape), array(INT32, lengths + 4 * first, heads),
            array(INT64, totals, group + 1)[group], array(INT32, floor + 4 * first, heads),
            array(BOOL, kept + first * width, shape),
        )  # fmt: skip

    return compile_worker(work)


@functools.cache
def _lister() -> int:
    def work(arguments: int, row: int) -> None:
        kept, width, indices = read_arguments(arguments, 3)
        _list(array(BOOL, kept + row * width, width), array(INT32, indices + 4 * row * width, width))

    return compile_worker(work)


@kernel
def _choose(bits: Any, lengths: Any, total: int, floor: Any, kept: Any) -> None:
    """Mark the kept tokens of a group of heads.

    Args:
        bits: uint32 [M, n], the scores' float32 bits.
        lengths: int32 [M].
        total: Tokens that the heads keep together.
        floor: int32 [M], tokens each head is sure of.
        kept: bool [M, n], all False, written.
    """
    heads, width = bits.shape
    keys = np.zeros((heads, width), dtype=np.uint32)
    left = total
    for head in range(heads):
        _ordered(bits[head, : lengths[head]], keys[head])
    for head in range(heads):
        sure = min(floor[head], lengths[head])
        if sure > 0:
            _keep_best(keys[head : head + 1], sure, kept[head : head + 1])
            left -= sure
    _keep_best(keys, left, kept)


@kernel
def _ordered(bits: Any, keys: Any) -> None:
    """Turn float32 bits into integers of the same order, all above 0, which stands for no candidate."""
    for i in range(len(bits)):
        x = bits[i]
        if x == _SIGN:  # -0.0 equals 0.0
            x = np.uint32(0)
        keys[i] = ~x if x & _SIGN else x | _SIGN


@kernel
def _keep_best(keys: Any, count: int, kept: Any) -> None:
    """Mark the `count` highest candidates of [M, n] in `kept`; they stop being candidates."""
    threshold, ties = _threshold(keys.ravel(), count)
    heads, width = keys.shape
    for i in range(width):
        for head in range(heads):
            key = keys[head, i]
            if key > threshold or (key == threshold and ties > 0):
                ties -= key == threshold
                kept[head, i] = True
                keys[head, i] = 0


@kernel
def _threshold(keys: Any, count: int) -> tuple[Any, int]:
    """Find the `count`-th highest key by three digits, the highest first.

    Returns:
        The key, and how many tokens with exactly that key belong to the `count`. If there are not that many
        candidates (keys above 0): 0 and 0, so that all of them are above the threshold.
    """
    if count <= 0:
        return np.uint32(0xFFFFFFFF), 0
    found = 0
    candidates = keys[keys > 0]
    if len(candidates) <= count:
        return np.uint32(0), 0
    for shift in (21, 10, 0):
        histogram = np.zeros(1 << _DIGIT_BITS, dtype=np.int64)
        mask = (1 << (10 if shift == 0 else _DIGIT_BITS)) - 1
        for key in candidates:
            histogram[(key >> shift) & mask] += 1
        digit = mask
        while histogram[digit] < count:
            count -= histogram[digit]
            digit -= 1
        found |= digit << shift
        candidates = candidates[(candidates >> shift) & mask == digit]
    return np.uint32(found), count


@kernel
def _list(kept: Any, indices: Any) -> None:
    """Write the indices of the marks [n] of a row to `indices`, as many as there are."""
    count = 0
    for i in range(len(kept)):
        if kept[i]:
            indices[count] = i
            count += 1
