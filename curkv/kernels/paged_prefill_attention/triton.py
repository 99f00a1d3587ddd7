"""Attention of chunks of new tokens over ragged pages, with Triton: a tile holds some tokens' whole group.

A short chunk behind a long text has few tiles. Each is then computed by several programs, which take equal
shares of the tokens that it sees, and their partial results are merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.formats.base import Store
from curkv.kernels.formats.triton import (
    attention_block,
    attention_constants,
    attention_masks,
    load_operands,
    narrow_queries,
    operand_bytes,
    operands_of,
    pointers,
    scaled,
    softmax_step,
)
from curkv.kernels.pages import Pages
from curkv.kernels.triton_util import (
    BOOKS,
    LN_2,
    LOG2_E,
    UNSEEN,
    dot,
    find_oldest,
    find_sequence,
    find_slots,
    is_older_cuda,
    narrow,
    num_processors,
    power_of_two,
    sequence_block,
    softcapped,
)

_MAX_BLOCK_N = 64
_TILE_BYTES = 16384
_SMALL_TILE_BYTES = 8192
"""Before Hopper the products' operands lie in registers: larger tiles of keys would spill."""
MOST_SPLITS = 16
"""Most programs that share what a tile sees."""


def paged_prefill_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    query_start: Tensor,
    scale: float,
    return_lse: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with a chunk of queries per sequence; see `reference.paged_prefill_attention`."""
    tokens, query_heads, head_dim = q.shape
    heads = table.shape[1]
    group = query_heads // heads
    out = torch.empty(tokens, query_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, query_heads, dtype=torch.float32, device=q.device)
    if not tokens:
        return (out, lse) if return_lse else out
    block_m = query_rows(pages.k)
    tile = block_m // group
    masked = window is not None or softcap is not None or sinks is not None
    # What masks takes registers beside the operands.
    most, tile_bytes = (_MAX_BLOCK_N // 2, _SMALL_TILE_BYTES) if masked else (_MAX_BLOCK_N, _TILE_BYTES)
    if is_older_cuda():
        tile_bytes = _SMALL_TILE_BYTES
    tiles = tokens // tile + len(slots)
    splits = num_splits(tiles * heads, num_processors(q.device))
    partial, partial_lse = out, lse
    if splits > 1:
        partial_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
        partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
    _attend[(tiles, heads, splits)](
        q,
        pointers(pages.k),
        pointers(pages.v),
        table,
        lengths,
        slots,
        query_start,
        partial,
        partial_lse,
        tokens * query_heads,
        q.stride(0),
        q.stride(1),
        *table.stride()[:2],
        *lengths.stride(),
        len(slots),
        scale * LOG2_E.value,
        *attention_masks(pages, window, softcap, sinks, unused=lse),
        **attention_constants(pages, group, window, softcap, sinks),
        TILE=tile,
        BLOCK_M=block_m,
        BLOCK_N=attention_block(pages.k, most, tile_bytes),
        BLOCK_B=sequence_block(len(slots)),
        SPLIT=splits > 1,
        num_warps=8 if block_m == 128 else 4,
        num_stages=2,
    )
    if splits > 1:
        _merge[(tokens, query_heads)](
            partial,
            partial_lse,
            out,
            lse,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_D=power_of_two(head_dim),
            BLOCK_SPLITS=MOST_SPLITS,
            num_warps=4,
        )
    return (out, lse) if return_lse else out


def num_splits(programs: int, processors: int) -> int:
    """Programs that share the tokens that a tile sees, where so many of one each would not fill a GPU."""
    return max(1, min(MOST_SPLITS, processors // programs))


def query_rows(keys: Store) -> int:
    """Rows of a tile of queries, (token, head of the group) each; fewer where widened keys take registers."""
    return 128 if operand_bytes(keys) <= 256 and not operands_of(keys).widened else 64


@triton.jit
def load_queries(
    q, token, head, stride_token, stride_head, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Read queries [rows, BLOCK_D] of tokens and heads [rows]; 0 where `valid` is unset and past HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    pointers = q + token.to(tl.int64)[:, None] * stride_token + head[:, None] * stride_head + d[None, :]
    return tl.load(pointers, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _attend_block(
    block,
    queries,
    last,
    end,
    pages_k,
    pages_v,
    row,
    scale_log2,
    position,
    oldest,
    softcap_log2,
    peak,
    total,
    acc,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold tokens `block` to `block + BLOCK_N` of a head into a running softmax.

    With CAUSAL each query reads up to index `last` [BLOCK_M]; without, the whole block. With WINDOWED
    it reads from position `oldest` [BLOCK_M] on.
    """
    index = block + tl.arange(0, BLOCK_N)
    valid = index < end
    place = find_slots(row, index, valid, PAGE_SIZE)
    keys = load_operands(pages_k, place, valid, KEYS, HEAD_DIM, BLOCK_D)
    scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    scores = scaled(scores * scale_log2, pages_k, place, valid, KEYS)
    scores = softcapped(scores, SOFTCAPPED, softcap_log2)
    if CAUSAL:
        scores = tl.where(index[None, :] <= last[:, None], scores, float("-inf"))
    if WINDOWED:
        stands = tl.load(position + place, mask=valid, other=-1)
        scores = tl.where(stands[None, :] >= oldest[:, None], scores, float("-inf"))
    values = load_operands(pages_v, place, valid, VALUES, HEAD_DIM, BLOCK_D)
    return softmax_step(scores, values, pages_v, place, valid, peak, total, acc, VALUES)


@triton.jit(do_not_specialize=["rows", "num_sequences", "window"], do_not_specialize_on_alignment=BOOKS)
def _attend(
    q,
    pages_k,
    pages_v,
    table,
    lengths,
    slots,
    query_start,
    out,
    lse,
    rows,
    stride_q_token,
    stride_q_head,
    stride_table_slot,
    stride_table_head,
    stride_lengths_slot,
    stride_lengths_head,
    num_sequences,
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
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (tile of TILE tokens, KV head, split); row r of a tile is token r // GROUP, head r % GROUP.

    The last tiles of a sequence see most, and begin first. With SPLIT `out` and `lse` are partial results,
    `rows` of each split, float32 and in powers of two.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = find_sequence(query_start, tile, num_sequences, TILE, BLOCK_B)
    start = tl.load(query_start + sequence)
    chunk = tl.load(query_start + sequence + 1) - start
    first = (tile - start // TILE - sequence) * TILE
    slot = tl.load(slots + sequence).to(tl.int64)
    if (first >= chunk) | (slot < 0):
        return
    length = tl.load(lengths + slot * stride_lengths_slot + head * stride_lengths_head)
    row = table + slot * stride_table_slot + head * stride_table_head
    r = tl.arange(0, BLOCK_M)
    step = tl.minimum(first + r // GROUP, chunk - 1)
    token = start + step
    query_head = head * GROUP + r % GROUP
    valid = (r < TILE * GROUP) & (first + r // GROUP < chunk)
    queries = load_queries(q, token, query_head, stride_q_token, stride_q_head, valid, HEAD_DIM, BLOCK_D)
    queries = narrow_queries(queries, pages_k, KEYS)
    last = length - chunk + step

    peak = tl.full([BLOCK_M], UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        sink = tl.load(sinks + query_head) * LOG2_E
        peak = tl.where(tl.program_id(2) == 0, sink, peak)
        total += tl.where(tl.program_id(2) == 0, 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = length - chunk + tl.minimum(first + TILE, chunk)
    seen_by_all = (length - chunk + first + 1) // BLOCK_N * BLOCK_N
    begin = 0
    oldest = step
    if WINDOWED:
        seen = length - chunk + first + 1
        begin = find_oldest(position, row, seen, WINDOWED, window, PAGE_SIZE) // BLOCK_N * BLOCK_N
        oldest += tl.load(position + find_slots(row, seen - 1, seen > 0, PAGE_SIZE)) - first - window + 1
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        begin += tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
    for block in range(begin, tl.minimum(seen_by_all, end), BLOCK_N):
        peak, total, acc = _attend_block(
            block, queries, last, end, pages_k, pages_v, row, scale_log2, position, oldest, softcap_log2,
            peak, total, acc,
            False, WINDOWED, SOFTCAPPED, KEYS, VALUES, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for block in range(tl.maximum(begin, seen_by_all), end, BLOCK_N):
        peak, total, acc = _attend_block(
            block, queries, last, end, pages_k, pages_v, row, scale_log2, position, oldest, softcap_log2,
            peak, total, acc,
            True, WINDOWED, SOFTCAPPED, KEYS, VALUES, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    result = token.to(tl.int64) * (tl.num_programs(1) * GROUP) + query_head
    if SPLIT:
        result += tl.program_id(2).to(tl.int64) * rows
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + result[:, None] * HEAD_DIM + d[None, :], narrow(acc, out.dtype.element_ty), mask=mask)
    logarithm = peak + tl.log2(total)
    if not SPLIT:
        logarithm *= LN_2
    tl.store(lse + result, logarithm, mask=valid)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial,
    partial_lse,
    out,
    lse,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Program (token, query head): the weighted sum of its partial results."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.num_programs(0) * tl.num_programs(1)
    split = tl.arange(0, BLOCK_SPLITS)
    part = split.to(tl.int64) * rows + row
    weights = tl.load(partial_lse + part, mask=split < splits, other=float("-inf"))
    peak = tl.max(weights, 0)
    weights = tl.exp2(weights - peak)
    weight = tl.sum(weights, 0)
    d = tl.arange(0, BLOCK_D)
    mask = (split < splits)[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(partial + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    total = tl.sum(parts * weights[:, None], 0) / weight
    tl.store(out + row * HEAD_DIM + d, narrow(total, out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + row, (peak + tl.log2(weight)) * LN_2)
