"""Moving kept tokens to the front of a head's pages, with Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.pages import Pages
from curkv.kernels.triton_util import power_of_two

_BLOCK_BYTES = 16384
_BLOCK_SIDE = 256


def compact(pages: Pages, source: Tensor, target: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Move tokens of each row, with everything a page holds about them; see `reference.compact`.

    Keys and values move as 32-bit words, whatever their dtype.
    """
    rows = len(counts)
    if not rows:
        return
    k, v = (x.view(torch.int32) for x in (pages.k, pages.v))
    words = k.shape[2]
    _move_rows[(rows, len(pages.arrays))](
        k,
        v,
        pages.position,
        pages.k_sq,
        pages.v_sq,
        pages.attention,
        pages.k_scale,
        pages.v_scale,
        source,
        target,
        indices,
        counts,
        source.stride(0),
        target.stride(0),
        indices.stride(0),
        PAGE_SIZE=pages.k.shape[1],
        WORDS=words,
        BLOCK_WORDS=power_of_two(words),
        BLOCK_N=_BLOCK_BYTES // 4 // power_of_two(words),
        BLOCK_SIDE=_BLOCK_SIDE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["stride_indices"])
def _move_rows(
    k,
    v,
    position,
    k_sq,
    v_sq,
    attention,
    k_scale,
    v_scale,
    source,
    target,
    indices,
    counts,
    stride_source,
    stride_target,
    stride_indices,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
):
    """Program (row, one of the arrays): no two programs touch the same memory."""
    row = tl.program_id(0).to(tl.int64)
    array = tl.program_id(1)
    count = tl.load(counts + row)
    source += row * stride_source
    target += row * stride_target
    indices += row * stride_indices
    if array == 0:
        _move(k, source, target, indices, count, PAGE_SIZE, WORDS, BLOCK_WORDS, BLOCK_N)
    elif array == 1:
        _move(v, source, target, indices, count, PAGE_SIZE, WORDS, BLOCK_WORDS, BLOCK_N)
    elif array == 2:
        _move(position, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)
    elif array == 3:
        _move(k_sq, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)
    elif array == 4:
        _move(v_sq, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)
    elif array == 5:
        _move(attention, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)
    elif k_scale is not None:
        if array == 6:
            _move(k_scale, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)
        else:
            _move(v_scale, source, target, indices, count, PAGE_SIZE, 1, 1, BLOCK_SIDE)


@triton.jit
def _move(
    memory,
    source,
    target,
    indices,
    count,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Move a row's tokens of WORDS words each, block by block.

    Token i comes from index >= i, so a block's targets lie before all that later blocks read; the barrier has
    every thread read its part of a block before any writes.
    """
    n = tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    for block in range(0, count, BLOCK_N):
        to = block + n
        index = tl.load(indices + to, mask=to < count, other=0)
        from_page = tl.load(source + index // PAGE_SIZE, mask=to < count, other=0).to(tl.int64)
        to_page = tl.load(target + to // PAGE_SIZE, mask=to < count, other=0).to(tl.int64)
        read = from_page * PAGE_SIZE + index % PAGE_SIZE
        write = to_page * PAGE_SIZE + to % PAGE_SIZE
        mask = ((to < count) & (read != write))[:, None] & (word < WORDS)[None, :]
        tokens = tl.load(memory + read[:, None] * WORDS + word[None, :], mask=mask, other=0)
        tl.debug_barrier()
        tl.store(memory + write[:, None] * WORDS + word[None, :], tokens, mask=mask)
