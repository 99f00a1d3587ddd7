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

    Every array moves as 32-bit words, whatever its dtype.
    """
    rows = len(counts)
    if not rows:
        return
    arrays = [x if x.ndim > 2 else x.unsqueeze(-1) for x in pages.arrays.values()]
    memories = tuple(x.view(torch.int32) for x in arrays)
    words = tuple(x.shape[2] for x in memories)
    _move_rows[(rows, len(memories))](
        memories,
        source,
        target,
        indices,
        counts,
        source.stride(0),
        target.stride(0),
        indices.stride(0),
        PAGE_SIZE=pages.page_size,
        WORDS=words,
        BLOCKS=tuple(_BLOCK_SIDE if n == 1 else _BLOCK_BYTES // 4 // power_of_two(n) for n in words),
        BLOCKS_WORDS=tuple(map(power_of_two, words)),
        COUNT=len(memories),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["stride_source", "stride_target", "stride_indices"])
def _move_rows(
    memories,
    source,
    target,
    indices,
    counts,
    stride_source,
    stride_target,
    stride_indices,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_WORDS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Program (row, one of the arrays): no two programs touch the same memory."""
    row = tl.program_id(0).to(tl.int64)
    array = tl.program_id(1)
    count = tl.load(counts + row)
    source += row * stride_source
    target += row * stride_target
    indices += row * stride_indices
    for i in tl.static_range(COUNT):
        if array == i:
            _move(
                memories[i], source, target, indices, count, PAGE_SIZE, WORDS[i], BLOCKS_WORDS[i], BLOCKS[i]
            )


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
