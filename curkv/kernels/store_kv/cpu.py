"""Writing new keys and values into pages, with Numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined, kernel
from curkv.kernels.cpu.lanes import absolute, broadcast, fma, lane_max, lane_sum, maximum, mul
from curkv.kernels.cpu.memory import (
    FLOAT32,
    KINDS,
    address,
    load,
    load_int32,
    row_address,
    scales_address,
    store,
    store_int32,
    store_scalar,
)
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments
from curkv.kernels.pages import LARGEST_INT8, Pages
from curkv.kernels.rope.cpu import TOKENS_AT_ONCE, rotate


def store_kv(
    pages: Pages,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
) -> None:
    """Rotate the new keys and write them, their values and the side arrays; see `reference.store_kv`.

    head_dim is a multiple of 8.
    """
    tokens, heads, dim = k.shape
    dtype = pages.k.dtype
    if dim % 8:
        raise ValueError(f"head_dim {dim} must be a multiple of 8")
    arguments = (
        row_address(k, torch.float32), k.stride(0), k.stride(1),
        row_address(v, torch.float32), v.stride(0), v.stride(1),
        address(cos, torch.float32), address(sin, torch.float32), address(positions, torch.int32),
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0),
        address(slots, torch.int32), address(query_start, torch.int32),
        address(pages.k, dtype), address(pages.v, dtype), address(pages.position, torch.int32),
        address(pages.k_sq, torch.float32), address(pages.v_sq, torch.float32),
        address(pages.attention, torch.float32), scales_address(pages.k_scale), scales_address(pages.v_scale),
        heads, dim, pages.k.shape[1],
    )  # fmt: skip
    launch(_worker(dtype), -(-tokens // TOKENS_AT_ONCE), tokens, *arguments)


@functools.cache
def _worker(dtype: torch.dtype) -> int:
    kind = KINDS[dtype]

    def work(arguments: int, part: int) -> None:
        first = part * TOKENS_AT_ONCE
        end = min(read_arguments(arguments, 1)[0], first + TOKENS_AT_ONCE)
        _store_tokens(kind, first, end, *read_arguments(arguments + 8, 27))

    return compile_worker(work)


@kernel
def _store_tokens(
    kind: Any,
    first: int,
    end: int,
    k: int,
    k_token_stride: int,
    k_head_stride: int,
    v: int,
    v_token_stride: int,
    v_head_stride: int,
    cos: int,
    sin: int,
    positions: int,
    table: int,
    table_stride: int,
    head_stride: int,
    lengths: int,
    lengths_stride: int,
    slots: int,
    query_start: int,
    k_pages: int,
    v_pages: int,
    position: int,
    k_sq: int,
    v_sq: int,
    attention: int,
    k_scale: int,
    v_scale: int,
    heads: int,
    dim: int,
    page_size: int,
) -> None:
    """Write the tokens from `first` to `end`. Addresses, and strides in elements."""
    half = dim // 2
    rotated = np.empty(dim, np.float32)
    turned = rotated.ctypes.data
    i = 0
    for t in range(first, end):
        while load_int32(query_start + 4 * i + 4) <= t:
            i += 1
        slot = load_int32(slots + 4 * i)
        until_end = load_int32(query_start + 4 * i + 4) - t
        where = load_int32(positions + 4 * t)
        row = 4 * where * half
        for head in range(heads):
            index = load_int32(lengths + 4 * (slot * lengths_stride + head)) - until_end
            entry = slot * table_stride + head * head_stride + index // page_size
            token = load_int32(table + 4 * entry) * page_size + index % page_size
            key = k + 4 * (t * k_token_stride + head * k_head_stride)
            value = v + 4 * (t * v_token_stride + head * v_head_stride)
            place = token * dim * kind.itemsize
            store_scalar(FLOAT32, k_sq + 4 * token, rotate(key, cos + row, sin + row, half, FLOAT32, turned))
            _write(turned, dim, kind, k_pages + place, k_scale + 4 * token if k_scale else 0)
            store_scalar(FLOAT32, v_sq + 4 * token, _squares(value, dim))
            _write(value, dim, kind, v_pages + place, v_scale + 4 * token if v_scale else 0)
            store_int32(position + 4 * token, where)
            store_scalar(FLOAT32, attention + 4 * token, np.float32(0.0))


@inlined
def _write(source: int, dim: int, kind: Any, target: int, scale: int) -> None:
    """Write float32 [dim] as `kind`; if `scale` is an address, divided by what is written there."""
    factor = broadcast(np.float32(1.0))
    if scale:
        largest = broadcast(np.float32(0.0))
        for d in range(0, dim, 8):
            largest = maximum(absolute(load(FLOAT32, source + 4 * d)), largest)
        most = lane_max(largest)
        store_scalar(FLOAT32, scale, most / np.float32(LARGEST_INT8))
        if most > 0:
            factor = broadcast(np.float32(LARGEST_INT8) / most)
    for d in range(0, dim, 8):
        store(kind, target + kind.itemsize * d, mul(load(FLOAT32, source + 4 * d), factor))


@inlined
def _squares(source: int, dim: int) -> Any:
    """The squared norm of float32 [dim]."""
    squares = broadcast(np.float32(0.0))
    for d in range(0, dim, 8):
        value = load(FLOAT32, source + 4 * d)
        squares = fma(value, value, squares)
    return lane_sum(squares)
