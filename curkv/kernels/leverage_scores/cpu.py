"""CurDKV's approximate leverage scores over ragged pages, with Numba."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from curkv.kernels.cpu.memory import FLOAT32, KINDS, address, load_scalar, scales_address
from curkv.kernels.cpu.rows import dot_rows
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
    key, value = np.empty_like(out), np.empty_like(out)
    if sketch is None:
        _gather(pages.k_sq.numpy(), pages.v_sq.numpy(), rows, counts, key, value)
    else:
        columns = _in_threes(sketch.T)
        for storage, scales, energies in ((pages.k, pages.k_scale, key), (pages.v, pages.v_scale, value)):
            kind, place = KINDS[storage.dtype], address(storage, storage.dtype)
            size, factors = storage.shape[1], scales_address(scales)
            _sketch(kind, place, factors, size, columns, rows, counts, energies)
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


def _in_threes(columns: Tensor) -> np.ndarray[Any, Any]:
    """Copy [rank, head_dim] to float32 with rows of zeros that fill the last three."""
    padded = torch.zeros(-(-len(columns) // 3) * 3, columns.shape[1])
    padded[: len(columns)] = columns
    return padded.numpy()


@njit(parallel=True, nogil=True, cache=True)
def _sketch(
    kind: Any,
    storage: int,
    scales: int,
    page_size: int,
    columns: Any,
    table: Any,
    lengths: Any,
    energies: Any,
) -> None:
    """Write ||x G||^2 of each row's tokens to `energies`, [N, width].

    Args:
        kind: Of the storage, see `cpu.memory`.
        storage: Address of K or V; page_size is a multiple of 4.
        scales: Address of their scales, or 0.
        page_size: Tokens per page.
        columns: float32 [rank, head_dim], the columns of G; rank is a multiple of 3.
        table: int32 [N, max_pages].
        lengths: int32 [N].
        energies: float32 [N, width], written.
    """
    page_values = page_size * columns.shape[1]
    for row in prange(len(lengths)):
        products = np.empty((len(columns), 4), dtype=np.float32)
        length = lengths[row]
        for page in range((length + page_size - 1) // page_size):
            start = page * page_size
            place = storage + np.int64(table[row, page]) * page_values * kind.itemsize
            stored = energies[row, start : min(start + page_size, length)]
            _sketch_page(kind, place, columns, products, stored)
            if scales:
                factors = scales + 4 * np.int64(table[row, page]) * page_size
                for token in range(len(stored)):
                    stored[token] *= load_scalar(FLOAT32, factors + 4 * token) ** 2


@njit(nogil=True, cache=True)
def _sketch_page(kind: Any, tokens: int, columns: Any, products: Any, energies: Any) -> None:
    """Sketch the tokens of one page, four at a time; up to three more are read and ignored."""
    rank, head_dim = columns.shape
    for first in range(0, len(energies), 4):
        place = tokens + first * head_dim * kind.itemsize
        for column in range(0, rank, 3):
            three, out = columns.ctypes.data + column * head_dim * 4, products.ctypes.data + column * 16
            dot_rows(kind, 3, three, head_dim, place, 4, out, 4, 0)
        for token in range(min(4, len(energies) - first)):
            total = np.float32(0)
            for column in range(rank):
                total += products[column, token] * products[column, token]
            energies[first + token] = total


@njit(parallel=True, nogil=True, cache=True)
def _score(
    key: Any, value: Any, lengths: Any, window: int, left: bool, corrected: bool, combine: int, out: Any
) -> None:
    """Normalise the energies [N, width] in place, per window unless it is 0, and combine them into `out`."""
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
