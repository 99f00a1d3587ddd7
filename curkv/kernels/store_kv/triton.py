"""Writing new keys and values into pages, with Triton: RoPE, of queries too, and side arrays in a launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.triton import layout_of, pointers, write
from curkv.kernels.pages import Pages
from curkv.kernels.rope.triton import load_angles, rotate, rotate_in_place
from curkv.kernels.triton_util import BOOKS, find_slots, power_of_two, sequence_block

_MAX_BLOCK_H = 4


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

    A slot below 0 stands for no sequence: its tokens are not written.
    """
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    block_h = min(_MAX_BLOCK_H, power_of_two(heads))
    queries = k if q is None else q
    query_heads = 0 if q is None else q.shape[1]
    _store_tokens[(tokens, triton.cdiv(heads, block_h) + triton.cdiv(query_heads, block_h))](
        queries,
        k,
        v,
        cos,
        sin,
        positions,
        pointers(pages.k),
        pointers(pages.v),
        pages.position,
        pages.k_sq,
        pages.v_sq,
        pages.attention,
        table,
        lengths,
        slots,
        query_start,
        queries.stride(0),
        queries.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *table.stride()[:2],
        *lengths.stride(),
        len(slots),
        heads,
        query_heads,
        KEYS=layout_of(pages.k),
        VALUES=layout_of(pages.v),
        HEAD_DIM=head_dim,
        PAGE_SIZE=pages.page_size,
        BLOCK_H=block_h,
        BLOCK_HALF=power_of_two(head_dim // 2),
        BLOCK_B=sequence_block(len(slots)),
        num_warps=2,
    )


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=BOOKS)
def _store_tokens(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    pages_k,
    pages_v,
    pages_position,
    pages_k_sq,
    pages_v_sq,
    pages_attention,
    table,
    lengths,
    slots,
    query_start,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    num_sequences,
    num_heads,
    num_query_heads,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Program (token, block of KV heads, or, behind those, of query heads)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0)
    position = tl.load(positions + token)
    c, s = load_angles(cos, sin, position, HEAD_DIM, BLOCK_HALF)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    key_blocks = tl.cdiv(num_heads, BLOCK_H)
    if tl.program_id(1) >= key_blocks:
        head -= key_blocks * BLOCK_H
        rotate_in_place(
            q, token, head, num_query_heads, stride_q_token, stride_q_head, c, s, HEAD_DIM, BLOCK_HALF
        )
        return
    ends = tl.arange(0, BLOCK_B)
    ended = tl.load(query_start + 1 + ends, mask=ends < num_sequences, other=2147483647) <= token
    sequence = tl.sum(ended.to(tl.int32), 0)
    slot = tl.load(slots + sequence, mask=sequence < num_sequences, other=-1).to(tl.int64)
    end = tl.load(query_start + 1 + sequence, mask=slot >= 0, other=0)

    valid = head < tl.where(slot >= 0, num_heads, 0)
    length = tl.load(lengths + slot * stride_lengths_slot + head * stride_lengths_head, mask=valid, other=0)
    row = table + slot * stride_table_slot + head * stride_table_head
    place = find_slots(row, length - end + token, valid, PAGE_SIZE)

    i = tl.arange(0, BLOCK_HALF)
    mask = valid[:, None] & (i < HALF)[None, :]
    k += token.to(tl.int64) * stride_k_token + head[:, None] * stride_k_head + i[None, :]
    v += token.to(tl.int64) * stride_v_token + head[:, None] * stride_v_head + i[None, :]
    k1 = tl.load(k, mask=mask, other=0.0).to(tl.float32)
    k2 = tl.load(k + HALF, mask=mask, other=0.0).to(tl.float32)
    v1 = tl.load(v, mask=mask, other=0.0).to(tl.float32)
    v2 = tl.load(v + HALF, mask=mask, other=0.0).to(tl.float32)
    k1, k2 = rotate(k1, k2, c, s)

    write(k1, k2, pages_k, place, valid, mask, i, KEYS, HEAD_DIM)
    write(v1, v2, pages_v, place, valid, mask, i, VALUES, HEAD_DIM)
    tl.store(pages_position + place, tl.zeros([BLOCK_H], tl.int32) + position, mask=valid)
    tl.store(pages_k_sq + place, tl.sum(k1 * k1 + k2 * k2, 1), mask=valid)
    tl.store(pages_v_sq + place, tl.sum(v1 * v1 + v2 * v2, 1), mask=valid)
    tl.store(pages_attention + place, tl.zeros([BLOCK_H], tl.float32), mask=valid)
