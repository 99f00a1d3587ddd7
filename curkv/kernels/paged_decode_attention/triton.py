"""Attention of one new token per sequence over ragged pages, with Triton.

Heads of a batch are of all lengths, so work is divided by tokens and not by heads: the tokens of all heads
lie in one row, and as many programs as run at once take equal shares of it. A share may end within a head,
and may go on over several; each piece of a head gives a partial result, and those are merged. The shares are
found on the device, so that the grid depends on shapes alone and a graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.triton import (
    attention_block,
    attention_constants,
    attention_masks,
    layout_of,
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
    UNSEEN,
    dot,
    find_oldest,
    find_slots,
    narrow,
    num_processors,
    power_of_two,
    softcapped,
)

UNIT = tl.constexpr(16)
"""Tokens of the units by which the row is divided. A head has one more, for what it costs to begin."""
LEAST_UNITS = tl.constexpr(16)
"""Fewest units of a share: the partial results are a few percent of what is read."""

_PROGRAMS_PER_PROCESSOR = 4
_BLOCK_HEADS = tl.constexpr(512)
_BLOCK_PARTS = 16
_MAX_BLOCK_N = 64
_TILE_BYTES = 16384


def paged_decode_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query per sequence over each head's tokens; see `reference.paged_decode_attention`.

    The grid depends on shapes only, never on lengths. A slot below 0 stands for no sequence: its output is 0.
    """
    batch, query_heads, head_dim = q.shape
    heads, page_size = table.shape[1], pages.page_size
    max_tokens = table.shape[2] * page_size
    out = torch.empty(batch, query_heads, head_dim, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    all_heads, group = batch * heads, query_heads // heads
    programs = num_programs(all_heads, max_tokens, _PROGRAMS_PER_PROCESSOR * num_processors(q.device))
    lse = torch.empty(programs + all_heads, group, dtype=torch.float32, device=q.device)
    partial = torch.empty(*lse.shape, head_dim, dtype=torch.float32, device=q.device)
    takers = torch.empty(all_heads, 2, dtype=torch.int32, device=q.device)
    masked = window is not None or softcap is not None or sinks is not None
    layout = (table, lengths, slots, *table.stride()[:2], *lengths.stride())
    masks = attention_masks(pages, window, softcap, sinks, unused=lse)
    _attend[(programs,)](
        q,
        pointers(pages.k),
        pointers(pages.v),
        *layout,
        partial,
        lse,
        takers,
        q.stride(0),
        q.stride(1),
        all_heads,
        heads,
        scale * LOG2_E.value,
        *masks,
        **attention_constants(pages, group, window, softcap, sinks),
        BLOCK_G=max(16, power_of_two(group)),
        BLOCK_N=attention_block(pages.k, _MAX_BLOCK_N, _TILE_BYTES),
        num_warps=4,
        num_stages=2 if masked and layout_of(pages.k) == "int4" else 3,  # with 3 registers spill
    )
    _merge[(batch, query_heads)](
        partial,
        lse,
        takers,
        slots,
        out,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_PARTS=_BLOCK_PARTS,
        num_warps=4,
    )
    return out


def num_programs(heads: int, max_tokens: int, resident: int) -> int:
    """Programs that share the tokens of so many heads of up to `max_tokens`; `resident` ones run at once."""
    units: int = heads * (-(-max_tokens // UNIT.value) + 1)
    return max(1, min(resident, units // int(LEAST_UNITS.value)))


@triton.jit
def _units(lengths, slots, stride_slot, stride_head, head, all_heads, heads):
    """Units of heads [n] of the batch, counted through it; none where there is no sequence."""
    slot = tl.load(slots + head // heads, mask=head < all_heads, other=-1).to(tl.int64)
    length = tl.load(lengths + slot * stride_slot + head % heads * stride_head, mask=slot >= 0, other=0)
    return tl.where(slot >= 0, tl.cdiv(length, UNIT) + 1, 0)


@triton.jit(do_not_specialize=["all_heads", "heads", "window"], do_not_specialize_on_alignment=BOOKS)
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
    takers,
    stride_q_sequence,
    stride_q_head,
    all_heads,
    heads,
    scale_log2,
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
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """A program: its share of the units, a KV head of a sequence after the other.

    What it makes of a head is the partial result number program + head: from one piece to the next one of the
    two grows. The first and the last program that take of a head are noted.
    """
    program = tl.program_id(0)
    total = program * 0
    for first in range(0, all_heads, _BLOCK_HEADS):
        some = first + tl.arange(0, _BLOCK_HEADS)
        total += tl.sum(
            _units(lengths, slots, stride_lengths_slot, stride_lengths_head, some, all_heads, heads), 0
        )
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), LEAST_UNITS)
    first_unit = program * share
    last_unit = tl.minimum(first_unit + share, total)
    begin, first_row, last_row, before = program * 0, program * 0, program * 0, program * 0
    for first in range(0, all_heads, _BLOCK_HEADS):
        some = first + tl.arange(0, _BLOCK_HEADS)
        units = _units(lengths, slots, stride_lengths_slot, stride_lengths_head, some, all_heads, heads)
        ends = before + tl.cumsum(units, 0)
        passed = (ends <= first_unit) & (some < all_heads)
        first_row += tl.sum(passed.to(tl.int32), 0)
        last_row += tl.sum(((ends < last_unit) & (some < all_heads)).to(tl.int32), 0)
        begin += tl.sum(tl.where(passed, units, 0), 0)
        before += tl.sum(units, 0)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    rows = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    for later in range(0, tl.where(first_unit < last_unit, last_row + 1 - first_row, 0)):
        row = first_row + later
        unit = tl.maximum(begin, first_unit)
        sequence = (row // heads).to(tl.int64)
        head = row % heads
        slot = tl.load(slots + sequence).to(tl.int64)
        length = tl.load(
            lengths + slot * stride_lengths_slot + head * stride_lengths_head, mask=slot >= 0, other=0
        )
        after = begin + tl.where(slot >= 0, tl.cdiv(length, UNIT) + 1, 0)
        start = tl.maximum(unit - begin - 1, 0) * UNIT
        end = tl.minimum((last_unit - begin - 1) * UNIT, length)
        query_head = head * GROUP + g
        pointers = q + sequence * stride_q_sequence + query_head[:, None] * stride_q_head + d[None, :]
        queries = narrow_queries(tl.load(pointers, mask=rows, other=0.0), pages_k, KEYS)
        table_row = table + slot * stride_table_slot + head * stride_table_head

        peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_G], tl.float32)
        if SINKS:
            sink = tl.load(sinks + query_head, mask=g < GROUP, other=0.0) * LOG2_E
            peak = tl.where(unit == begin, sink, peak)
            weight += tl.where(unit == begin, 1.0, 0.0)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        oldest = find_oldest(position, table_row, length, WINDOWED, window, PAGE_SIZE)
        if WINDOWED:  # a block must have a token that is seen
            start = tl.maximum(start, oldest // UNIT * UNIT)
        for block in range(start, end, BLOCK_N):
            index = block + n
            valid = index < end
            place = find_slots(table_row, index, valid, PAGE_SIZE)
            keys = load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D)
            scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_G, BLOCK_N], tl.float32))
            scores = scaled(scores * scale_log2, pages_k, place, valid, KEYS)
            scores = softcapped(scores, SOFTCAPPED, softcap_log2)
            scores = tl.where((valid & (index >= oldest))[None, :], scores, float("-inf"))
            values = load_operands(pages_v, place, valid, VALUES, HEAD_DIM, BLOCK_D)
            peak, weight, acc = softmax_step(scores, values, pages_v, place, valid, peak, weight, acc, VALUES)

        part = (program + row).to(tl.int64) * GROUP + g
        acc /= tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(partial + part[:, None] * HEAD_DIM + d[None, :], acc, mask=rows)
        tl.store(lse + part, peak + tl.log2(weight), mask=g < GROUP)
        tl.store(takers + 2 * row, program, mask=unit == begin)
        tl.store(takers + 2 * row + 1, program, mask=after <= last_unit)
        begin = after


@triton.jit
def _merge(
    partial,
    lse,
    takers,
    slots,
    out,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Program (sequence, query head): the weighted sum of a head's partial results; 0 without a sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    row = sequence * (tl.num_programs(1) // GROUP) + query_head // GROUP
    there = tl.load(slots + sequence) >= 0
    first = tl.load(takers + 2 * row, mask=there, other=0)
    last = tl.load(takers + 2 * row + 1, mask=there, other=-1)
    d = tl.arange(0, BLOCK_D)
    peak = tl.full([], UNSEEN, tl.float32)
    weight = tl.zeros([], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for program in range(first, last + 1, BLOCK_PARTS):
        some = program + tl.arange(0, BLOCK_PARTS)
        part = (some + row) * GROUP + query_head % GROUP
        weights = tl.load(lse + part, mask=some <= last, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(weights, 0))
        weights = tl.exp2(weights - new_peak)
        pointers = partial + part[:, None] * HEAD_DIM + d[None, :]
        parts = tl.load(pointers, mask=(some <= last)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        decay = tl.exp2(peak - new_peak)
        weight = weight * decay + tl.sum(weights, 0)
        total = total * decay + tl.sum(parts * weights[:, None], 0)
        peak = new_peak
    total /= tl.where(weight > 0, weight, 1.0)
    result = sequence * tl.num_programs(1) + query_head
    tl.store(out + result * HEAD_DIM + d, narrow(total, out.dtype.element_ty), mask=d < HEAD_DIM)
