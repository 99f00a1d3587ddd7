"""Choosing the tokens to keep, with Triton: a threshold is found digit by digit, nothing is sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curkv.kernels.triton_util import power_of_two

_BLOCK = 1024


def select(
    scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the best tokens of each head, or of each layer's heads together; see `reference.select`.

    The indices are a view of a wider tensor, a row's contiguous.
    """
    layers, heads, width = scores.shape
    device = scores.device
    indices = torch.empty(layers, heads, width, dtype=torch.int32, device=device)
    counts = torch.zeros(layers, heads, dtype=torch.int32, device=device)
    if not scores.numel():
        return indices[..., :0], counts
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
    indices = indices[..., : int(counts.max())]
    _pad[(layers * heads,)](indices, counts, width, indices.shape[2], BLOCK=_BLOCK, num_warps=4)
    return indices, counts


def _thresholds(scores: Tensor, lengths: Tensor, count: Tensor, heads: int, sure: Tensor | None) -> Tensor:
    """Find where each group of `heads` consecutive heads is cut.

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
    groups = lengths.numel() // heads
    cuts = torch.empty(groups, 2, dtype=torch.int32, device=scores.device)
    block_h = power_of_two(heads)
    _find_thresholds[(groups,)](
        scores,
        lengths,
        count.contiguous(),
        cuts if sure is None else sure,
        cuts,
        scores.shape[2],
        HEADS=heads,
        FLOOR=sure is not None,
        BLOCK_H=block_h,
        BLOCK_N=max(1, _BLOCK // block_h),
        num_warps=8,
    )
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


@triton.jit(do_not_specialize=["width"])
def _find_thresholds(
    scores,
    lengths,
    counts,
    sure,
    cuts,
    width,
    HEADS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (group): four digits of the threshold, the highest first, then the last tie that is kept."""
    group = tl.program_id(0).to(tl.int64)
    scores += group * HEADS * width
    lengths += group * HEADS
    sure += group * HEADS * 2
    left = tl.load(counts + group)
    end = tl.max(tl.load(lengths + tl.arange(0, BLOCK_H), mask=tl.arange(0, BLOCK_H) < HEADS, other=0), 0)
    digits = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32)
    for shift in tl.static_range(24, -8, -8):
        histogram = tl.zeros([256], tl.int32)
        for block in range(0, end, BLOCK_N):
            keys = _candidates(block, scores, lengths, sure, width, HEADS, FLOOR, BLOCK_H, BLOCK_N)
            keys = tl.reshape(keys, [BLOCK_N * BLOCK_H])
            wanted = keys > 0
            if shift < 24:
                wanted = wanted & (keys >> (shift + 8) == threshold)
            histogram += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=wanted)
        if shift == 24:
            left = tl.maximum(tl.minimum(left, tl.sum(histogram, 0)), 0)
        from_here = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.sum((from_here >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digits > digit, histogram, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)

    last = tl.full([], -1, tl.int32)
    ties_before = tl.full([], 0, tl.int32)
    i = tl.arange(0, BLOCK_N * BLOCK_H)
    for block in range(0, end, BLOCK_N):
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
    """Program (layer and head): the indices of its kept tokens in order."""
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
    tl.store(counts + row, count)


@triton.jit(do_not_specialize=["stride", "width"])
def _pad(indices, counts, stride, width, BLOCK: tl.constexpr):
    """Program (layer and head): -1 from its count up to `width`, the largest count."""
    row = tl.program_id(0).to(tl.int64)
    for block in range(tl.load(counts + row), width, BLOCK):
        place = block + tl.arange(0, BLOCK)
        tl.store(indices + row * stride + place, -1, mask=place < width)
