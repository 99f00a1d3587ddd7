"""CurDKV's approximate leverage scores over ragged pages, with Numba."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from curkv.kernels.pages import Pages

_COMBINE = {"product": 0, "mean": 1, "key": 2, "value": 3}


def leverage_scores(
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    normalization: Literal["window", "head"] = "window",
    window: int = 16,
    partial: Literal["corrected", "left", "right"] = "corrected",
    combine: Literal["product", "mean", "key", "value"] = "product",
    sketch: Tensor | None = None,
) -> Tensor:
    """Score the stored tokens of every head; see `reference.leverage_scores`."""
    rows, counts = table.contiguous().numpy(), lengths.contiguous().numpy()
    width = int(counts.max()) if counts.size else 0
    scores = torch.empty(len(counts), width)
    out = scores.numpy()
    if sketch is None:
        key, value = np.empty_like(out), np.empty_like(out)
        _gather(pages.k_sq.numpy(), pages.v_sq.numpy(), rows, counts, key, value)
    else:
        raise NotImplementedError
    span = window if normalization == "window" else 0
    _score(key, value, counts, span, partial == "left", partial == "corrected", _COMBINE[combine], out)
    return scores


@njit(parallel=True, nogil=True, cache=True)
def _gather(k_sq: Any, v_sq: Any, table: Any, lengths: Any, key: Any, value: Any) -> None:
    """Copy both side arrays of each row's tokens to `key` and `value`, [N, width]."""
    page_size = k_sq.shape[1]
    for row in prange(len(lengths)):
        length = lengths[row]
        for page in range((length + page_size - 1) // page_size):
            start = page * page_size
            source = table[row, page]
            for i in range(min(page_size, length - start)):
                key[row, start + i] = k_sq[source, i]
                value[row, start + i] = v_sq[source, i]


@njit(parallel=True, nogil=True, cache=True)
def _score(
    key: Any, value: Any, lengths: Any, window: int, left: bool, corrected: bool, combine: int, out: Any
) -> None:
    """Normalise the energies [N, width] in place, by windows unless `window` is 0, and combine them into `out`."""
    for row in prange(len(lengths)):
        length = lengths[row]
        k, v, scores = key[row, :length], value[row, :length], out[row]
        if window > 0:
            _share_of_windows(k, window, left, corrected)
            _share_of_windows(v, window, left, corrected)
        total = 0.0
        for i in range(length):
            if combine == 0:
                score = k[i] * v[i]
            elif combine == 1:
                score = (k[i] + v[i]) * np.float32(0.5)
            else:
                score = k[i] if combine == 2 else v[i]
            scores[i] = score
            total += score
        factor = np.float32(1.0 / total) if total > 0 else np.float32(0)
        for i in range(length):
            scores[i] *= factor
        scores[length:] = -np.inf


@njit(nogil=True, cache=True)
def _share_of_windows(energy: Any, window: int, left: bool, corrected: bool) -> None:
    """Divide energies [length] by the sum of their window, in place."""
    length = len(energy)
    end = length % window if left else window
    start = 0
    while start < length:
        end = min(end, length)
        total = np.float32(0)
        for i in range(start, end):
            total += energy[i]
        if corrected:
            total *= np.float32(window / max(1, end - start))
        factor = np.float32(1) / total if total > 0 else np.float32(0)
        for i in range(start, end):
            energy[i] *= factor
        start, end = end, end + window
