"""Attention of one new token per sequence over ragged pages, with Triton; long heads are split."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.triton import (
    attention_block,
    load_operands,
    narrow_queries,
    pointers,
    scaled,
    softmax_step,
)
from curkv.kernels.pages import Pages
from curkv.kernels.triton_util import (
    BOOKS,
    LOG2_E,
    dot,
    find_oldest,
    find_slots,
    narrow,
    num_processors,
    power_of_two,
    softcapped,
)

MIN_SPLIT = 256
"""Tokens that a program reads at least before a head is split further: the partial result it writes is then a
few percent of what it reads."""

_PROGRAMS_PER_PROCESSOR = 4
_BLOCK_SPLITS = 16
_MAX_BLOCK_N = 64
_TILE_BYTES = 16384
_BLOCK_TOKENS = 256


def paged_decode_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    scale: float,
    accumulate: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query per sequence over each head's tokens; see `reference.paged_decode_attention`.

    The grid depends on shapes only, never on lengths. A slot below 0 stands for no sequence: its output is 0.
    With `accumulate` the logits are kept, float32 [B, Hq, tokens a head may have], so that K is read once.
    """
    batch, query_heads, head_dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    max_tokens = table.shape[2] * page_size
    out = torch.empty(batch, query_heads, head_dim, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    per_processor = 1 if accumulate else _PROGRAMS_PER_PROCESSOR
    splits = _num_splits(batch * heads, per_processor * num_processors(q.device), max_tokens)
    lse = torch.empty(batch, query_heads, splits, dtype=torch.float32, device=q.device)
    partial = out if splits == 1 else torch.empty(*lse.shape, head_dim, dtype=torch.float32, device=q.device)
    total_lse = lse if splits == 1 else torch.empty_like(lse[..., 0])
    logits = lse
    if accumulate:
        logits = torch.empty(batch, query_heads, max_tokens, dtype=torch.float32, device=q.device)
    layout = (table, lengths, slots, *table.stride()[:2], *lengths.stride())
    masks = pages.position, window or 0
    masked = window is not None or softcap is not None or sinks is not None
    _attend[(batch, heads, splits)](
        q,
        pointers(pages.k),
        pointers(pages.v),
        *layout,
        partial,
        lse,
        logits,
        q.stride(0),
        q.stride(1),
        max_tokens,
        scale * LOG2_E.value,
        splits,
        *masks,
        (softcap or 0.0) * LOG2_E.value,
        lse if sinks is None else sinks,
        KEYS=pages.k.format.name,
        VALUES=pages.v.format.name,
        GROUP=query_heads // heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_G=max(16, power_of_two(query_heads // heads)),
        BLOCK_N=attention_block(pages.k, _MAX_BLOCK_N, _TILE_BYTES),
        BLOCK_D=power_of_two(head_dim),
        MIN_SPLIT=MIN_SPLIT,
        KEEP_LOGITS=accumulate,
        WINDOWED=window is not None,
        SOFTCAPPED=softcap is not None,
        SINKS=sinks is not None,
        num_warps=4,
        num_stages=2 if masked and pages.k.format.name == "int4" else 3,  # with 3 registers spill
    )
    if splits > 1:
        _reduce[(batch, query_heads)](
            partial,
            lse,
            *layout,
            out,
            total_lse,
            splits,
            GROUP=query_heads // heads,
            HEAD_DIM=head_dim,
            BLOCK_D=power_of_two(head_dim),
            BLOCK_S=power_of_two(splits),
            BLOCK_SPLITS=_BLOCK_SPLITS,
            MIN_SPLIT=MIN_SPLIT,
            num_warps=4,
        )
    if accumulate:
        _accumulate[(batch, heads, triton.cdiv(max_tokens, _BLOCK_TOKENS))](
            logits,
            total_lse,
            *layout,
            pages.attention,
            max_tokens,
            *masks,
            GROUP=query_heads // heads,
            PAGE_SIZE=page_size,
            BLOCK_N=_BLOCK_TOKENS,
            WINDOWED=window is not None,
            num_warps=4,
        )
    return out


def _num_splits(heads: int, programs: int, max_tokens: int) -> int:
    """Splits of each of `heads` heads that make about `programs`, if a head may get as long as that."""
    return max(1, min(-(-programs // heads), -(-max_tokens // MIN_SPLIT)))


@triton.jit
def _split_size(length, splits, MIN_SPLIT: tl.constexpr):
    """Tokens of each split of a head, a multiple of MIN_SPLIT."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), MIN_SPLIT), 1) * MIN_SPLIT


@triton.jit(do_not_specialize=["splits", "max_tokens", "window"], do_not_specialize_on_alignment=BOOKS)
def _attend(
    q,
    pages_k,
    pages_v,
    table,
    lengths,
    slots,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    partial,
    lse,
    logits,
    stride_q_sequence,
    stride_q_head,
    max_tokens,
    scale_log2,
    splits,
    position,
    window,
    softcap_log2,
    sinks,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Program (sequence, KV head, split): its group's attention over its share of the head's tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    slot = tl.load(slots + sequence).to(tl.int64)
    length = tl.load(
        lengths + slot * stride_lengths_slot + head * stride_lengths_head, mask=slot >= 0, other=0
    )
    size = _split_size(length, splits, MIN_SPLIT)
    start = split * size
    end = tl.minimum(start + size, length)
    if (start >= length) & (split > 0):
        return
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    rows = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    query_head = head * GROUP + g
    pointers = q + sequence * stride_q_sequence + query_head[:, None] * stride_q_head + d[None, :]
    queries = narrow_queries(tl.load(pointers, mask=rows, other=0.0), pages_k, KEYS)
    row = table + slot * stride_table_slot + head * stride_table_head
    result = sequence * tl.num_programs(1) * GROUP + query_head

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if SINKS:
        sink = tl.load(sinks + query_head, mask=g < GROUP, other=0.0) * LOG2_E
        peak = tl.where(split == 0, sink, peak)
        total += tl.where(split == 0, 1.0, 0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    oldest = find_oldest(position, row, length, WINDOWED, window, PAGE_SIZE)
    for block in range(tl.maximum(start, oldest // BLOCK_N * BLOCK_N), end, BLOCK_N):
        index = block + n
        valid = index < end
        place = find_slots(row, index, valid, PAGE_SIZE)
        keys = load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D)
        scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_G, BLOCK_N], tl.float32))
        scores = scaled(scores * scale_log2, pages_k, place, valid, KEYS)
        scores = softcapped(scores, SOFTCAPPED, softcap_log2)
        scores = tl.where((valid & (index >= oldest))[None, :], scores, float("-inf"))
        if KEEP_LOGITS:
            mask = (g < GROUP)[:, None] & valid[None, :]
            tl.store(logits + result[:, None] * max_tokens + index[None, :], scores, mask=mask)
        values = load_operands(pages_v, place, valid, VALUES, HEAD_DIM, BLOCK_D)
        peak, total, acc = softmax_step(scores, values, pages_v, place, valid, peak, total, acc, VALUES)

    out = result * splits + split
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial + out[:, None] * HEAD_DIM + d[None, :], narrow(acc, partial.dtype.element_ty), mask=rows)
    tl.store(lse + out, peak + tl.log2(total), mask=g < GROUP)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=BOOKS)
def _reduce(
    partial,
    lse,
    table,
    lengths,
    slots,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    out,
    total_lse,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """Program (sequence, query head): the weighted sum of its splits."""
    sequence = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    slot = tl.load(slots + sequence).to(tl.int64)
    length = tl.load(
        lengths + slot * stride_lengths_slot + query_head // GROUP * stride_lengths_head,
        mask=slot >= 0,
        other=0,
    )
    count = tl.maximum(tl.cdiv(length, _split_size(length, splits, MIN_SPLIT)), 1)
    result = sequence * tl.num_programs(1) + query_head
    lse += result * splits
    split = tl.arange(0, BLOCK_S)
    all_lse = tl.load(lse + split, mask=split < count, other=float("-inf"))
    peak = tl.max(all_lse, 0)
    shift = tl.where(peak > float("-inf"), peak, 0.0)
    weight = tl.sum(tl.exp2(all_lse - shift), 0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for block in range(0, count, BLOCK_SPLITS):
        some = block + tl.arange(0, BLOCK_SPLITS)
        weights = tl.exp2(tl.load(lse + some, mask=some < count, other=float("-inf")) - shift)
        pointers = partial + (result * splits + some)[:, None] * HEAD_DIM + d[None, :]
        parts = tl.load(pointers, mask=(some < count)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        total += tl.sum(parts * weights[:, None], 0)
    total /= tl.where(weight > 0, weight, 1.0)
    tl.store(out + result * HEAD_DIM + d, narrow(total, out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(total_lse + result, peak + tl.log2(weight))


@triton.jit(do_not_specialize=["max_tokens", "window"], do_not_specialize_on_alignment=BOOKS)
def _accumulate(
    logits,
    total_lse,
    table,
    lengths,
    slots,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    attention,
    max_tokens,
    position,
    window,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Program (sequence, KV head, block of tokens): adds the group's probabilities.

    Pages may be shared, hence the atomic.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + sequence).to(tl.int64)
    length = tl.load(
        lengths + slot * stride_lengths_slot + head * stride_lengths_head, mask=slot >= 0, other=0
    )
    index = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(2) * BLOCK_N >= length:
        return
    row = table + slot * stride_table_slot + head * stride_table_head
    valid = (index < length) & (index >= find_oldest(position, row, length, WINDOWED, window, PAGE_SIZE))
    paid = tl.zeros([BLOCK_N], tl.float32)
    for g in tl.static_range(GROUP):
        result = (sequence * tl.num_programs(1) + head) * GROUP + g
        scores = tl.load(logits + result * max_tokens + index, mask=valid, other=float("-inf"))
        paid += tl.exp2(scores - tl.load(total_lse + result))
    place = find_slots(row, index, valid, PAGE_SIZE)
    tl.atomic_add(attention + place, paid, mask=valid, sem="relaxed")
