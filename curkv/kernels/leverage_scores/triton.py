"""CurDKV's approximate leverage scores over ragged pages, with Triton."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from curkv.kernels.formats.triton import (
    attention_block,
    layout_of,
    load_operands,
    operands_of,
    pointers,
    scaled_energies,
)
from curkv.kernels.pages import Pages, longest
from curkv.kernels.triton_util import dot, find_slots, power_of_two

_BLOCK = 2048
_MAX_BLOCK_N = 64
_TILE_BYTES = 16384


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
    """Score the stored tokens of every head; see `reference.leverage_scores`."""
    rows = len(lengths)
    width = longest(lengths) if width is None else width
    scores = torch.empty(rows, width, dtype=torch.float32, device=lengths.device)
    if not width:
        return scores
    energies = (pages.k_sq, pages.v_sq) if sketch is None else _sketch(pages, table, lengths, sketch, width)
    span = window if normalization == "window" else power_of_two(window)
    _score_rows[(rows,)](
        *energies,
        table,
        lengths,
        scores,
        table.stride(0),
        width,
        span,
        PAGE_SIZE=pages.page_size,
        PAGED=sketch is None,
        BY_WINDOW=normalization == "window",
        LEFT=partial == "left",
        CORRECTED=partial == "corrected",
        COMBINE=combine,
        BLOCK_W=max(1, _BLOCK // power_of_two(span)),
        BLOCK_SPAN=power_of_two(span),
        num_warps=8,
    )
    return scores


def _sketch(
    pages: Pages, table: Tensor, lengths: Tensor, sketch: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Energies float32 [N, width] of keys and of values projected by `sketch` [head_dim, rank]."""
    rows, columns = len(lengths), max(16, power_of_two(sketch.shape[1]))
    sketch = pad(sketch, (0, columns - sketch.shape[1]))
    operands = operands_of(pages.k), operands_of(pages.v)
    block_n = attention_block(pages.k, _MAX_BLOCK_N, _TILE_BYTES)
    key = torch.empty(rows, width, dtype=torch.float32, device=lengths.device)
    value = torch.empty_like(key)
    _sketch_rows[(triton.cdiv(width, block_n), rows)](
        pointers(pages.k),
        pointers(pages.v),
        table,
        lengths,
        *(_parts(sketch, each.dtype) for each in operands),
        key,
        value,
        table.stride(0),
        width,
        KEYS=layout_of(pages.k),
        VALUES=layout_of(pages.v),
        KEY_PARTS=_num_parts(operands[0].dtype),
        VALUE_PARTS=_num_parts(operands[1].dtype),
        HEAD_DIM=pages.head_dim,
        PAGE_SIZE=pages.page_size,
        BLOCK_N=block_n,
        BLOCK_D=power_of_two(pages.head_dim),
        BLOCK_R=columns,
        num_warps=4 if any(each.widened for each in operands) else 8,
    )
    return key, value


def _parts(sketch: Tensor, dtype: torch.dtype) -> Tensor:
    """G as parts [1 or 2, head_dim, columns] of a dtype, whose sum keeps G's precision in 16 bits too."""
    high = sketch.to(dtype)
    return torch.stack([high, (sketch - high.float()).to(dtype)][: _num_parts(dtype)])


def _num_parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


@triton.jit
def _energies(
    x,
    sketch,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Squared norms [BLOCK_N] of x G, G being the sum of its parts."""
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    mask = (d < HEAD_DIM)[:, None]
    product = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for part in range(PARTS):
        pointers = sketch + part * HEAD_DIM * BLOCK_R + d[:, None] * BLOCK_R + r[None, :]
        product = dot(x, tl.load(pointers, mask=mask, other=0.0), product)
    return tl.sum(product * product, 1)


@triton.jit(do_not_specialize=["stride_table", "width"])
def _sketch_rows(
    pages_k,
    pages_v,
    table,
    lengths,
    key_sketch,
    value_sketch,
    key,
    value,
    stride_table,
    width,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (block of tokens, row)."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    block = tl.program_id(0) * BLOCK_N
    if block >= length:
        return
    index = block + tl.arange(0, BLOCK_N)
    valid = index < length
    place = find_slots(table + row * stride_table, index, valid, PAGE_SIZE)
    out = row * width + index
    keys = load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D)
    key_energies = _energies(keys, key_sketch, KEY_PARTS, HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R)
    key_energies = scaled_energies(key_energies, pages_k, place, valid, KEYS)
    tl.store(key + out, key_energies, mask=valid)
    values = load_operands(pages_v, place, valid, VALUES, HEAD_DIM, BLOCK_D)
    value_energies = _energies(values, value_sketch, VALUE_PARTS, HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R)
    value_energies = scaled_energies(value_energies, pages_v, place, valid, VALUES)
    tl.store(value + out, value_energies, mask=valid)


@triton.jit
def _share(part, whole):
    """Divide, with 0 / 0 = 0."""
    return tl.where(whole > 0, part / tl.where(whole > 0, whole, 1.0), 0.0)


@triton.jit
def _combined(
    number,
    shift,
    length,
    key,
    value,
    row,
    window,
    PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    BY_WINDOW: tl.constexpr,
    CORRECTED: tl.constexpr,
    COMBINE: tl.constexpr,
    BLOCK_SPAN: tl.constexpr,
):
    """Combined energies of windows `number` [BLOCK_W, BLOCK_SPAN]; the tokens' indices; which are valid."""
    i = tl.arange(0, BLOCK_SPAN)
    index = number[:, None] * window + i[None, :] - shift
    valid = (i < window)[None, :] & (index >= 0) & (index < length)
    place = find_slots(row, index, valid, PAGE_SIZE) if PAGED else index
    k = tl.load(key + place, mask=valid, other=0.0)
    v = tl.load(value + place, mask=valid, other=0.0)
    if BY_WINDOW:
        k_sum = tl.sum(k, 1)
        v_sum = tl.sum(v, 1)
        if CORRECTED:
            count = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)
            k_sum = k_sum * (window / count)
            v_sum = v_sum * (window / count)
        k = _share(k, k_sum[:, None])
        v = _share(v, v_sum[:, None])
    if COMBINE == "product":
        score = k * v
    elif COMBINE == "mean":
        score = (k + v) / 2
    elif COMBINE == "key":
        score = k
    else:
        score = v
    return tl.where(valid, score, 0.0), index, valid


@triton.jit(do_not_specialize=["stride_table", "width", "window"])
def _score_rows(
    key,
    value,
    table,
    lengths,
    scores,
    stride_table,
    width,
    window,
    PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    BY_WINDOW: tl.constexpr,
    LEFT: tl.constexpr,
    CORRECTED: tl.constexpr,
    COMBINE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_SPAN: tl.constexpr,
):
    """Program (row): sums the row's scores, then writes each one's share; the second read comes from L2."""
    number = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + number)
    row = table + number * stride_table
    if not PAGED:
        key += number * width
        value += number * width
    shift = 0
    if LEFT:
        shift = (window - length % window) % window
    w = tl.arange(0, BLOCK_W)
    sums = tl.zeros([BLOCK_W], tl.float32)
    windows = tl.cdiv(length + shift, window)
    for block in range(0, windows, BLOCK_W):
        score, _, _ = _combined(
            block + w, shift, length, key, value, row, window,
            PAGE_SIZE, PAGED, BY_WINDOW, CORRECTED, COMBINE, BLOCK_SPAN,
        )  # fmt: skip
        sums += tl.sum(score, 1)
    total = tl.sum(sums, 0)
    scores += number * width
    for block in range(0, windows, BLOCK_W):
        score, index, valid = _combined(
            block + w, shift, length, key, value, row, window,
            PAGE_SIZE, PAGED, BY_WINDOW, CORRECTED, COMBINE, BLOCK_SPAN,
        )  # fmt: skip
        tl.store(scores + index, _share(score, total), mask=valid)
    i = tl.arange(0, BLOCK_W * BLOCK_SPAN)
    for block in range(length, width, BLOCK_W * BLOCK_SPAN):
        empty = tl.full([BLOCK_W * BLOCK_SPAN], float("-inf"), tl.float32)
        tl.store(scores + block + i, empty, mask=block + i < width)
