"""Choosing the tokens to keep, with Numba: a threshold is found digit by digit, nothing is sorted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

_DIGIT_BITS = 11
_SIGN = np.uint32(0x80000000)


def select(
    scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the highest-scoring tokens per head, or per layer with floors; see `reference.select`."""
    layers, heads, width = scores.shape
    groups = (layers * heads, 1) if floor is None else (layers, heads)
    stored = lengths.reshape(groups).numpy()
    sure = torch.zeros(groups, dtype=torch.int32) if floor is None else floor
    totals = keep.reshape(groups).sum(1).numpy()
    kept = np.zeros((*groups, width), dtype=np.bool_)
    bits = scores.contiguous().numpy().view(np.uint32).reshape(*groups, width)
    _choose(bits, stored, totals, sure.contiguous().numpy(), kept)
    counts = kept.sum(-1, dtype=np.int32)
    indices = np.full((layers * heads, counts.max(initial=0)), -1, dtype=np.int32)
    _list(kept.reshape(layers * heads, width), indices)
    return torch.from_numpy(indices).reshape(layers, heads, -1), torch.from_numpy(counts).reshape(
        layers, heads
    )


@njit(parallel=True, nogil=True, cache=True)
def _choose(bits: Any, lengths: Any, totals: Any, floor: Any, kept: Any) -> None:
    """Mark the kept tokens of every group of heads.

    Args:
        bits: uint32 [G, M, n], the scores' float32 bits.
        lengths: int32 [G, M].
        totals: int64 [G], tokens that the heads of a group keep together.
        floor: int32 [G, M], tokens each head is sure of.
        kept: bool [G, M, n], all False, written.
    """
    groups, heads, width = bits.shape
    for group in prange(groups):
        keys = np.zeros((heads, width), dtype=np.uint32)
        left = totals[group]
        for head in range(heads):
            _ordered(bits[group, head, : lengths[group, head]], keys[head])
        for head in range(heads):
            sure = min(floor[group, head], lengths[group, head])
            if sure > 0:
                _keep_best(keys[head : head + 1], sure, kept[group, head : head + 1])
                left -= sure
        _keep_best(keys, left, kept[group])


@njit(nogil=True, cache=True)
def _ordered(bits: Any, keys: Any) -> None:
    """Turn float32 bits into integers of the same order, all above 0, which stands for no candidate."""
    for i in range(len(bits)):
        x = bits[i]
        if x == _SIGN:  # -0.0 equals 0.0
            x = np.uint32(0)
        keys[i] = ~x if x & _SIGN else x | _SIGN


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(parallel=True, nogil=True, cache=True)
def _list(kept: Any, indices: Any) -> None:
    """Write the indices of the marks [N, n] of each row to `indices`, [N, max_kept]."""
    for row in prange(len(kept)):
        count = 0
        for i in range(kept.shape[1]):
            if kept[row, i]:
                indices[row, count] = i
                count += 1
