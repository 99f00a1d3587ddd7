"""Choosing the tokens to keep, with Triton: a threshold is found digit by digit, nothing is sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.triton_util import power_of_two

_BLOCK = 1024
_BLOCKS = 8
"""Blocks of candidates that a program counts."""
_DIGITS = 4
"""Of a key, 8 bits each, as kernels take it."""


def select(
    scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the best tokens of each head, or of each layer's heads together; see `reference.select`."""
    layers, heads, width = scores.shape
    device = scores.device
    indices = torch.empty(layers, heads, width, dtype=torch.int32, device=device)
    counts = torch.zeros(layers, heads, dtype=torch.int32, device=device)
    if not scores.numel():
        return indices, counts
    scores, lengths = scores.contiguous(), lengths.contiguous()
    if floor is None:
        sure = None
        chosen = _thresholds(scores, lengths, keep.reshape(-1, 1), 1, None)
    else:
        sure = _thresholds(scores, lengths, floor.reshape(-1, 1), 1, None)
        rest = keep.sum(1, dtype=torch.int32) - torch.minimum(floor, lengths).sum(1, dtype=torch.int32)
        chosen = _thresholds(scores, lengths, rest, heads, sure)
    _list_kept[(layers * heads,)](
        scores,
        lengths,
        chosen,
        chosen if sure is None else sure,
        indices,
        counts,
        width,
        HEADS=1 if sure is None else heads,
        FLOOR=sure is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return indices, counts


def _thresholds(scores: Tensor, lengths: Tensor, count: Tensor, heads: int, sure: Tensor | None) -> Tensor:
    """Find where each group of `heads` consecutive heads is cut.

    Programs that take some thousand candidates each count them: four times by a digit of their keys, the
    highest first, those that begin as the cut does, and then those that are equal to it. What a program
    counts is added to the others' counts, and which digit the cut has follows from all of them.

    Args:
        scores: float32 [L, H, n].
        lengths: int32 [L, H].
        count: int32 [groups], tokens to keep.
        heads: Heads of a group: 1, or all H of a layer.
        sure: int32 [L * H, 2], cuts of single heads; what they keep does not count. Or None.

    Returns:
        int32 [groups, 2]: the key (see `_keys`) of the lowest score kept, and the place, token * heads +
        head, of the last token kept of those with exactly that key; -1 if none.
    """
    groups, width, device = lengths.numel() // heads, scores.shape[2], scores.device
    block_h = power_of_two(heads)
    block_n = max(1, _BLOCK // block_h)
    parts = triton.cdiv(width, block_n * _BLOCKS)
    digits = torch.zeros(groups, _DIGITS, 256, dtype=torch.int32, device=device)
    ties = torch.empty(groups, parts, dtype=torch.int32, device=device)
    cuts = torch.empty(groups, 2, dtype=torch.int32, device=device)
    where = scores, lengths, count.contiguous(), cuts if sure is None else sure, digits, ties
    shape = {
        "HEADS": heads,
        "FLOOR": sure is not None,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        "BLOCKS": _BLOCKS,
    }
    for known in range(_DIGITS + 1):
        _count[(groups, parts)](*where, width, KNOWN=known, **shape, num_warps=8)
    _find_cut[(groups,)](*where, cuts, width, parts, **shape, num_warps=8)
    return cuts


@triton.jit
def _keys(scores, valid):
    """Integers uint32 of the scores' order, all above 0, which stands for what is not `valid`."""
    bits = scores.to(tl.uint32, bitcast=True)
    sign: tl.constexpr = 0x80000000
    bits = tl.where(bits == sign, 0, bits).to(tl.uint32)
    keys = tl.where(bits >= sign, bits ^ 0xFFFFFFFF, bits | sign).to(tl.uint32)
    return tl.where(valid, keys, 0).to(tl.uint32)


@triton.jit
def _above(keys, place, cuts, mask):
    """Which keys are kept by cuts: above the threshold, or equal to it and not past the last one kept."""
    threshold = tl.load(cuts, mask=mask, other=-1).to(tl.uint32, bitcast=True)
    last = tl.load(cuts + 1, mask=mask, other=-1)
    return (keys > threshold) | ((keys == threshold) & (place <= last))


@triton.jit
def _candidates(
    block,
    scores,
    lengths,
    sure,
    width,
    HEADS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys [BLOCK_N, BLOCK_H] of tokens from `block` on of a group's heads; 0 for what is no candidate."""
    token = block + tl.arange(0, BLOCK_N)[:, None]
    head = tl.arange(0, BLOCK_H)[None, :]
    length = tl.load(lengths + head, mask=head < HEADS, other=0)
    valid = token < length
    keys = _keys(tl.load(scores + head.to(tl.int64) * width + token, mask=valid, other=0.0), valid)
    if FLOOR:
        keys = tl.where(_above(keys, token, sure + 2 * head, head < HEADS), 0, keys).to(tl.uint32)
    return keys


@triton.jit
def _end_of(lengths, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Tokens of a group's longest head."""
    head = tl.arange(0, BLOCK_H)
    return tl.max(tl.load(lengths + head, mask=head < HEADS, other=0), 0)


@triton.jit
def _cut_so_far(left, digits, KNOWN: tl.constexpr):
    """The first `KNOWN` digits of a group's cut, and how many of what has these digits are kept.

    Args:
        left: Tokens that the group keeps.
        digits: int32 [4, 256], candidates by each digit, among those that have the cut's digits before it.
        KNOWN: Digits of which all candidates have been counted.
    """
    digit = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32)
    for step in tl.static_range(KNOWN):
        histogram = tl.load(digits + step * 256 + digit)
        if step == 0:
            left = tl.maximum(tl.minimum(left, tl.sum(histogram, 0)), 0)
        from_here = tl.cumsum(histogram, 0, reverse=True)
        own = tl.sum((from_here >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digit > own, histogram, 0), 0)
        threshold = (threshold << 8) | own.to(tl.uint32)
    return threshold, left


@triton.jit(do_not_specialize=["width"])
def _count(
    scores,
    lengths,
    counts,
    sure,
    digits,
    ties,
    width,
    KNOWN: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (group, part): counts its candidates by the next digit, or those that are equal to the cut."""
    group = tl.program_id(0).to(tl.int64)
    scores += group * HEADS * width
    lengths += group * HEADS
    sure += group * HEADS * 2
    digits += group * 4 * 256
    threshold, _ = _cut_so_far(tl.load(counts + group), digits, KNOWN)
    first = tl.program_id(1) * BLOCKS * BLOCK_N
    end = tl.minimum(_end_of(lengths, HEADS, BLOCK_H), first + BLOCKS * BLOCK_N)
    histogram = tl.zeros([256], tl.int32)
    equal = tl.full([], 0, tl.int32)
    for block in range(first, end, BLOCK_N):
        keys = _candidates(block, scores, lengths, sure, width, HEADS, FLOOR, BLOCK_H, BLOCK_N)
        keys = tl.reshape(keys, [BLOCK_N * BLOCK_H])
        if KNOWN == 4:
            equal += tl.sum((keys == threshold).to(tl.int32), 0)
        else:
            shift: tl.constexpr = 24 - 8 * KNOWN
            wanted = keys > 0
            if KNOWN > 0:
                wanted = wanted & (keys >> (shift + 8) == threshold)
            histogram += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=wanted)
    if KNOWN == 4:
        tl.store(ties + group * tl.num_programs(1) + tl.program_id(1), equal)
    elif first < end:
        tl.atomic_add(digits + KNOWN * 256 + tl.arange(0, 256), histogram, sem="relaxed")


@triton.jit(do_not_specialize=["width", "parts"])
def _find_cut(
    scores,
    lengths,
    counts,
    sure,
    digits,
    ties,
    cuts,
    width,
    parts,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (group): the threshold, and in the part where the last tie that is kept lies, its place."""
    group = tl.program_id(0).to(tl.int64)
    scores += group * HEADS * width
    lengths += group * HEADS
    sure += group * HEADS * 2
    ties += group * parts
    threshold, left = _cut_so_far(tl.load(counts + group), digits + group * 4 * 256, 4)
    ties_before = tl.full([], 0, tl.int32)
    part = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for some in range(0, parts, 256):
        other = some + tl.arange(0, 256)
        count = tl.load(ties + other, mask=other < parts, other=0)
        whole = (passed + tl.cumsum(count, 0) < left) & (other < parts)
        part += tl.sum(whole.to(tl.int32), 0)
        ties_before += tl.sum(tl.where(whole, count, 0), 0)
        passed += tl.sum(count, 0)

    last = tl.full([], -1, tl.int32)
    i = tl.arange(0, BLOCK_N * BLOCK_H)
    first = part * BLOCKS * BLOCK_N
    end = tl.minimum(_end_of(lengths, HEADS, BLOCK_H), first + BLOCKS * BLOCK_N)
    for block in range(first, tl.where(left > 0, end, first), BLOCK_N):
        keys = _candidates(block, scores, lengths, sure, width, HEADS, FLOOR, BLOCK_H, BLOCK_N)
        tie = (tl.reshape(keys, [BLOCK_N * BLOCK_H]) == threshold).to(tl.int32)
        rank = ties_before + tl.cumsum(tie, 0)
        place = (block + i // BLOCK_H) * HEADS + i % BLOCK_H
        last = tl.maximum(last, tl.max(tl.where((tie > 0) & (rank <= left), place, -1), 0))
        ties_before += tl.sum(tie, 0)
    tl.store(cuts + 2 * group, threshold.to(tl.int32, bitcast=True))
    tl.store(cuts + 2 * group + 1, last)


@triton.jit(do_not_specialize=["width"])
def _list_kept(
    scores,
    lengths,
    chosen,
    sure,
    indices,
    counts,
    width,
    HEADS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (layer and head): the indices of its kept tokens in order, and -1 behind them."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    scores += row * width
    indices += row * width
    count = tl.full([], 0, tl.int32)
    for block in range(0, length, BLOCK):
        token = block + tl.arange(0, BLOCK)
        valid = token < length
        keys = _keys(tl.load(scores + token, mask=valid, other=0.0), valid)
        kept = _above(keys, token * HEADS + row % HEADS, chosen + 2 * (row // HEADS), True)
        if FLOOR:
            kept = kept | _above(keys, token, sure + 2 * row, True)
        kept = kept & valid
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices + place, token, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    for block in range(count, width, BLOCK):
        place = block + tl.arange(0, BLOCK)
        tl.store(indices + place, -1, mask=place < width)
    tl.store(counts + row, count)
