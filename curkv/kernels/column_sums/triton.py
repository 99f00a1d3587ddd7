"""How much attention each stored token received from a chunk of queries, with Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.triton import attention_block, layout_of, load_operands, pointers, scaled
from curkv.kernels.paged_prefill_attention.triton import load_queries, query_rows
from curkv.kernels.pages import Pages
from curkv.kernels.triton_util import BOOKS, LOG2_E, dot, find_slots, narrow, power_of_two, softcapped

_MAX_BLOCK_N = 64
_TILE_BYTES = 16384


def column_sums(
    q: Tensor,
    lse: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Add the attention that a chunk's queries pay to each stored token; see `reference.column_sums`."""
    tokens, query_heads, head_dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    if not tokens:
        return
    group = query_heads // heads
    block_m = query_rows(pages.k)
    block_n = attention_block(pages.k, _MAX_BLOCK_N, _TILE_BYTES)
    _add_sums[(triton.cdiv(table.shape[2] * page_size, block_n), heads, len(slots))](
        q,
        lse,
        pointers(pages.k),
        pages.attention,
        table,
        lengths,
        slots,
        query_start,
        q.stride(0),
        q.stride(1),
        *table.stride()[:2],
        *lengths.stride(),
        scale * LOG2_E.value,
        pages.position,
        window or 0,
        (softcap or 0.0) * LOG2_E.value,
        KEYS=layout_of(pages.k),
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        TILE=block_m // group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=power_of_two(head_dim),
        WINDOWED=window is not None,
        SOFTCAPPED=softcap is not None,
        num_warps=4 if block_m < 128 and window is None and softcap is None else 8,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=BOOKS)
def _add_sums(
    q,
    lse,
    pages_k,
    attention,
    table,
    lengths,
    slots,
    query_start,
    stride_q_token,
    stride_q_head,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    scale_log2,
    position,
    window,
    softcap_log2,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
):
    """Program (block of tokens, KV head, sequence): the tokens' keys are read once, the queries pass by."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    slot = tl.load(slots + sequence).to(tl.int64)
    length = tl.load(
        lengths + slot * stride_lengths_slot + head * stride_lengths_head, mask=slot >= 0, other=0
    )
    block = tl.program_id(0) * BLOCK_N
    if block >= length:
        return
    start = tl.load(query_start + sequence)
    chunk = tl.load(query_start + sequence + 1) - start
    index = block + tl.arange(0, BLOCK_N)
    valid = index < length
    row = table + slot * stride_table_slot + head * stride_table_head
    place = find_slots(row, index, valid, PAGE_SIZE)
    if WINDOWED:
        stands = tl.load(position + place, mask=valid, other=-1)
        newest = tl.load(position + find_slots(row, length - 1, length > 0, PAGE_SIZE))
    keys = tl.trans(load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D))
    r = tl.arange(0, BLOCK_M)
    query_head = head * GROUP + r % GROUP
    sums = tl.zeros([BLOCK_N], tl.float32)
    first = tl.maximum(block - (length - chunk), 0) // TILE * TILE
    for tile in range(first, chunk, TILE):
        step = tile + r // GROUP
        reads = (r < TILE * GROUP) & (step < chunk)
        token = start + step
        queries = load_queries(q, token, query_head, stride_q_token, stride_q_head, reads, HEAD_DIM, BLOCK_D)
        scores = dot(narrow(queries, keys.dtype), keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        scores = scaled(scores * scale_log2, pages_k, place, valid, KEYS)
        scores = softcapped(scores, SOFTCAPPED, softcap_log2)
        normaliser = tl.load(
            lse + token.to(tl.int64) * (tl.num_programs(1) * GROUP) + query_head, mask=reads, other=0.0
        )
        paid = tl.exp2(scores - (normaliser * LOG2_E)[:, None])
        seen = reads[:, None] & (index[None, :] <= (length - chunk + step)[:, None])
        if WINDOWED:
            seen = seen & (stands[None, :] > (newest - chunk + 1 + step - window)[:, None])
        sums += tl.sum(tl.where(seen, paid, 0.0), 0)
    tl.atomic_add(attention + place, sums, mask=valid, sem="relaxed")
