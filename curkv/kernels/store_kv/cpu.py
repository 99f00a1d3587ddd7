"""Writing new keys and values into pages, with Numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.jit import inlined, kernel
from curkv.kernels.cpu.lanes import broadcast, fma, lane_sum
from curkv.kernels.cpu.memory import (
    FLOAT32,
    address,
    load,
    load_int32,
    row_address,
    store_int32,
    store_scalar,
)
from curkv.kernels.cpu.vectors import read_addresses
from curkv.kernels.cpu.workers import compile_worker, launch, read_arguments
from curkv.kernels.formats.base import VectorFormat
from curkv.kernels.formats.cpu.base import write
from curkv.kernels.pages import Pages
from curkv.kernels.rope.cpu import TOKENS_AT_ONCE, rope, rotate


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
    q: Tensor | None = None,
) -> None:
    """Rotate the new keys and write them, their values and the side arrays; see `reference.store_kv`.

    head_dim is a multiple of 8. Queries take a launch of their own.
    """
    if q is not None:
        rope(q, cos, sin, positions)
    tokens, heads, dim = k.shape
    if dim % 8:
        raise ValueError(f"head_dim {dim} must be a multiple of 8")
    arguments = (
        row_address(k, torch.float32), k.stride(0), k.stride(1),
        row_address(v, torch.float32), v.stride(0), v.stride(1),
        address(cos, torch.float32), address(sin, torch.float32), address(positions, torch.int32),
        row_address(table, torch.int32), table.stride(0), table.stride(1),
        row_address(lengths, torch.int32), lengths.stride(0),
        address(slots, torch.int32), address(query_start, torch.int32),
        address(pages.k.addresses, torch.int64), address(pages.v.addresses, torch.int64),
        address(pages.position, torch.int32),
        address(pages.k_sq, torch.float32), address(pages.v_sq, torch.float32),
        address(pages.attention, torch.float32),
        heads, dim, pages.page_size,
    )  # fmt: skip
    launch(_worker(pages.k.format, pages.v.format), -(-tokens // TOKENS_AT_ONCE), tokens, *arguments)


@functools.cache
def _worker(key_format: VectorFormat, value_format: VectorFormat) -> int:
    keys, values = key_format.on_cpu(), value_format.on_cpu()

    def work(arguments: int, part: int) -> None:
        first = part * TOKENS_AT_ONCE
        end = min(read_arguments(arguments, 1)[0], first + TOKENS_AT_ONCE)
        _store_tokens(keys, values, first, end, *read_arguments(arguments + 8, 25))

    return compile_worker(work)


@kernel
def _store_tokens(
    keys: Any,
    values: Any,
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
    heads: int,
    dim: int,
    page_size: int,
) -> None:
    """Write the tokens from `first` to `end`. Addresses, and strides in elements."""
    half = dim // 2
    k_store, v_store = read_addresses(keys, k_pages), read_addresses(values, v_pages)
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
            store_scalar(FLOAT32, k_sq + 4 * token, rotate(key, cos + row, sin + row, half, FLOAT32, turned))
            write(keys, turned, dim, k_store, token)
            store_scalar(FLOAT32, v_sq + 4 * token, _squares(value, dim))
            write(values, value, dim, v_store, token)
            store_int32(position + 4 * token, where)
            store_scalar(FLOAT32, attention + 4 * token, np.float32(0.0))


@inlined
def _squares(source: int, dim: int) -> Any:
    """The squared norm of float32 [dim]."""
    squares = broadcast(np.float32(0.0))
    for d in range(0, dim, 8):
        value = load(FLOAT32, source + 4 * d)
        squares = fma(value, value, squares)
    return lane_sum(squares)
