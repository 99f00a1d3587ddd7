"""CurDKV's approximate leverage scores over ragged pages, with Numba."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import kernel
from curkv.kernels.cpu.memory import address, floats, load_int32
from curkv.kernels.cpu.rows import dot_rows
from curkv.kernels.cpu.vectors import read_addresses
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.pages import Pages, longest

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
    width: int | None = None,
) -> Tensor:
    """Score the stored tokens of every head; see `reference.leverage_scores`.

    head_dim is a multiple of 8; with a sketch the page size is one of 4.
    """
    table, lengths = table.contiguous(), lengths.contiguous()
    count, width = len(lengths), longest(lengths) if width is None else width
    key, value, scores = (torch.empty(count, width) for _ in range(3))
    where = (
        key.data_ptr(), value.data_ptr(), scores.data_ptr(), address(lengths, torch.int32), width,
        window if normalization == "window" else 0, partial == "left", partial == "corrected",
        _COMBINE[combine], address(table, torch.int32), table.shape[1], pages.page_size,
    )  # fmt: skip
    if sketch is None:
        launch(
            _stored_worker(), count, *where, *(address(x, torch.float32) for x in (pages.k_sq, pages.v_sq))
        )
    else:
        columns = _in_threes(sketch.T)
        launch(
            _sketched_worker(pages.k.format, pages.v.format), count, *where,
            *(address(x.addresses, torch.int64) for x in (pages.k, pages.v)), columns.data_ptr(),
            *columns.shape,
        )  # fmt: skip
    return scores


def _in_threes(columns: Tensor) -> Tensor:
    """Copy [rank, head_dim] to float32 with rows of zeros that fill the last three."""
    padded = torch.zeros(-(-len(columns) // 3) * 3, columns.shape[1])
    padded[: len(columns)] = columns
    return padded


@functools.cache
def _stored_worker() -> int:
    """Scores a row by the energies that were stored."""

    def work(arguments: int, row: int) -> None:
        key, value, out, lengths, width, window, left, corrected, combine = read_arguments(arguments, 9)
        table, max_pages, page_size, k_sq, v_sq = read_arguments(arguments + 8 * 9, 5)
        start, length, own = 4 * row * width, load_int32(lengths + 4 * row), table + 4 * row * max_pages
        k, v = floats(key + start, length), floats(value + start, length)
        _gather(k_sq, v_sq, own, page_size, k, v)
        _score(k, v, window, left, corrected, combine, floats(out + start, width))

    return compile_worker(work)


@functools.cache
def _sketched_worker(key_format: VectorFormat, value_format: VectorFormat) -> int:
    """Scores a row by energies that are estimated from its keys and values."""
    keys, values = key_format.on_cpu(), value_format.on_cpu()

    def work(arguments: int, row: int) -> None:
        key, value, out, lengths, width, window, left, corrected, combine = read_arguments(arguments, 9)
        table, max_pages, page_size, k_pages, v_pages = read_arguments(arguments + 8 * 9, 5)
        columns, rank, head_dim = read_arguments(arguments + 8 * 14, 3)
        start, length, own = 4 * row * width, load_int32(lengths + 4 * row), table + 4 * row * max_pages
        k, v = floats(key + start, length), floats(value + start, length)
        _sketch(keys, read_addresses(keys, k_pages), page_size, columns, rank, head_dim, own, k)
        _sketch(values, read_addresses(values, v_pages), page_size, columns, rank, head_dim, own, v)
        _score(k, v, window, left, corrected, combine, floats(out + start, width))

    return compile_worker(work)


@kernel
def _gather(k_sq: int, v_sq: int, table: int, page_size: int, key: Any, value: Any) -> None:
    """Copy what both side arrays, [num_pages, page_size], hold of a row's tokens."""
    length = len(key)
    for page in range((length + page_size - 1) // page_size):
        start, place = page * page_size, 4 * load_int32(table + 4 * page) * page_size
        keys, values = floats(k_sq + place, page_size), floats(v_sq + place, page_size)
        for i in range(min(page_size, length - start)):
            key[start + i] = keys[i]
            value[start + i] = values[i]


@kernel
def _sketch(
    vectors: Any, store: Any, page_size: int, columns: int, rank: int, head_dim: int, table: int,
    energies: Any,
) -> None:  # fmt: skip
    """Write ||x G||^2 of a row's tokens to `energies`.

    Args:
        vectors: Primitives of the format.
        store: Where keys or values lie.
        page_size: Tokens per page, a multiple of 4.
        columns: Address of float32 [rank, head_dim], the columns of G.
        rank: A multiple of 3.
        head_dim: A multiple of 8.
        table: Address of the row's pages, int32.
        energies: float32 [length], written.
    """
    products = np.empty((rank, 4), dtype=np.float32)
    length = len(energies)
    for page in range((length + page_size - 1) // page_size):
        start, token = page * page_size, load_int32(table + 4 * page) * page_size
        stored = energies[start : min(start + page_size, length)]
        _sketch_page(vectors, store, token, columns, head_dim, products, stored)


@kernel
def _sketch_page(
    vectors: Any, store: Any, page_token: int, columns: int, head_dim: int, products: Any, energies: Any
) -> None:
    """Sketch the tokens of one page, four at a time; up to three more are read and ignored."""
    rank = len(products)
    for first in range(0, len(energies), 4):
        for column in range(0, rank, 3):
            three, out = columns + column * head_dim * 4, products.ctypes.data + column * 16
            dot_rows(vectors, 3, three, head_dim, store, page_token + first, 4, out, 4, 0)
        for token in range(min(4, len(energies) - first)):
            total = np.float32(0)
            for column in range(rank):
                total += products[column, token] * products[column, token]
            energies[first + token] = total


@kernel
def _score(k: Any, v: Any, window: int, left: int, corrected: int, combine: int, scores: Any) -> None:
    """Normalise a row's energies in place, per window unless it is 0, and combine them into `scores`."""
    length = len(k)
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


@kernel
def _share_of_windows(energy: Any, window: int, left: int, corrected: int) -> None:
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
