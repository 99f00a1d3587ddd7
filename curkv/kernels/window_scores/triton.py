"""How much attention the newest queries pay to each stored token, with Triton."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.triton import (
    attention_block,
    layout_of,
    load_operands,
    load_tokens,
    pointers,
    scaled,
)
from curkv.kernels.pages import Pages, longest
from curkv.kernels.triton_util import (
    LOG2_E,
    dot,
    find_slots,
    narrow,
    num_processors,
    power_of_two,
    softcapped,
)

MIN_SPLIT = 512
"""Tokens that a program of the first pass reads at least."""

_PROGRAMS_PER_PROCESSOR = 4
_MAX_BLOCK_M = 64
_MAX_BLOCK_N = 64
_TILE_BYTES = 16384


def window_scores(
    queries: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    reduction: Literal["mean", "max"] = "mean",
    lse: Tensor | None = None,
    width: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score the stored tokens by the attention of the last w queries; see `reference.window_scores`."""
    rows, window, group, head_dim = queries.shape
    width = longest(lengths) if width is None else width
    scores = torch.empty(rows, width, dtype=torch.float32, device=queries.device)
    if not width:
        return scores
    block_m = min(_MAX_BLOCK_M, max(16, power_of_two(window * group)))
    block_n = attention_block(pages.k, _MAX_BLOCK_N, _TILE_BYTES)
    layout = (
        queries.contiguous(),
        pointers(pages.k),
        pages.position,
        table,
        lengths,
        table.stride(0),
        scale * LOG2_E.value,
        window,
        (softcap or 0.0) * LOG2_E.value,
    )
    constants = {
        "SOFTCAPPED": softcap is not None,
        "CAUSAL": lse is None,
        "KEYS": layout_of(pages.k),
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": pages.page_size,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": power_of_two(head_dim),
        "num_warps": 4 if softcap is None else 8,
        "num_stages": 2,
    }
    if lse is None:
        tiles = triton.cdiv(window * group, block_m)
        wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * num_processors(queries.device), rows * tiles)
        splits = max(1, min(wanted, triton.cdiv(width, MIN_SPLIT)))
        size = triton.cdiv(triton.cdiv(width, splits), block_n) * block_n
        every = splits + (sinks is not None)
        parts = torch.empty(rows, every, window * group, dtype=torch.float32, device=queries.device)
        if sinks is not None:
            parts[:, splits] = (sinks * LOG2_E.value).repeat(1, window)
        _normalisers[(rows, tiles, splits)](*layout, parts, every, size, **constants)
    else:
        parts = (lse * LOG2_E.value).reshape(rows, 1, window * group)
    _sum_probabilities[(rows, triton.cdiv(width, block_n))](
        *layout, parts, parts.shape[1], scores, width, MEAN=reduction == "mean", **constants
    )
    return scores


@triton.jit
def _logits(
    row,
    first,
    block,
    length,
    queries,
    pages_k,
    pages_position,
    table,
    scale_log2,
    window,
    softcap_log2,
    SOFTCAPPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Base-2 logits [BLOCK_M, BLOCK_N] of queries from `first` and tokens from `block` on; -inf if unread."""
    index = block + tl.arange(0, BLOCK_N)
    valid = index < length
    place = find_slots(table, index, valid, PAGE_SIZE)
    keys = load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D)
    r = first + tl.arange(0, BLOCK_M)
    tile = load_tokens(queries, row * (window * GROUP) + r, r < window * GROUP, HEAD_DIM, BLOCK_D)
    scores = dot(narrow(tile, keys.dtype), tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    read = (r < window * GROUP)[:, None] & valid[None, :]
    if CAUSAL:
        position = tl.load(pages_position + place, mask=valid, other=2147483647)
        newest = tl.load(pages_position + find_slots(table, length - 1, length > 0, PAGE_SIZE))
        own = newest - (window - 1) + r // GROUP
        read = read & (position[None, :] <= own[:, None])
    scores = softcapped(scaled(scores * scale_log2, pages_k, place, valid, KEYS), SOFTCAPPED, softcap_log2)
    return tl.where(read, scores, float("-inf"))


@triton.jit(do_not_specialize=["stride_table", "window", "every", "size"])
def _normalisers(
    queries,
    pages_k,
    pages_position,
    table,
    lengths,
    stride_table,
    scale_log2,
    window,
    softcap_log2,
    lse,
    every,
    size,
    SOFTCAPPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (row, tile of queries, split): base-2 log-sum-exp of each query over `size` tokens.

    `every` is how many parts the log-sum-exp of a query has, this one's and those of others.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in range(split * size, tl.minimum((split + 1) * size, length), BLOCK_N):
        scores = _logits(
            row, first, block, length, queries, pages_k, pages_position, table + row * stride_table,
            scale_log2, window, softcap_log2, SOFTCAPPED, CAUSAL,
            KEYS, GROUP, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak > float("-inf"), new_peak, 0.0)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        peak = new_peak
    r = first + tl.arange(0, BLOCK_M)
    out = lse + (row * every + split) * (window * GROUP) + r
    tl.store(out, peak + tl.log2(total), mask=r < window * GROUP)


@triton.jit(do_not_specialize=["stride_table", "window", "splits", "width"])
def _sum_probabilities(
    queries,
    pages_k,
    pages_position,
    table,
    lengths,
    stride_table,
    scale_log2,
    window,
    softcap_log2,
    lse,
    splits,
    scores,
    width,
    MEAN: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (row, block of tokens): mean or largest probability of all queries of the row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK_N
    length = tl.load(lengths + row)
    index = block + tl.arange(0, BLOCK_N)
    result = tl.zeros([BLOCK_N], tl.float32)
    if block < length:
        for first in range(0, window * GROUP, BLOCK_M):
            r = first + tl.arange(0, BLOCK_M)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for split in range(splits):
                pointers = lse + (row * splits + split) * (window * GROUP) + r
                part = tl.load(pointers, mask=r < window * GROUP, other=float("-inf"))
                new_peak = tl.maximum(peak, part)
                shift = tl.where(new_peak > float("-inf"), new_peak, 0.0)
                total = total * tl.exp2(peak - shift) + tl.exp2(part - shift)
                peak = new_peak
            whole = tl.where(total > 0, peak + tl.log2(total), 0.0)
            logits = _logits(
                row, first, block, length, queries, pages_k, pages_position,
                table + row * stride_table, scale_log2, window, softcap_log2, SOFTCAPPED, CAUSAL,
                KEYS, GROUP, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            paid = tl.exp2(logits - whole[:, None])
            if MEAN:
                result += tl.sum(paid, 0) / (window * GROUP)
            else:
                result = tl.maximum(result, tl.max(paid, 0))
    result = tl.where(index < length, result, float("-inf"))
    tl.store(scores + row * width + index, result, mask=index < width)
