"""Choosing the tokens to keep, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def select(
    scores: Tensor, lengths: Tensor, keep: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the highest-scoring tokens of each head, or of each layer's heads together.

    Without `floor` a head keeps its best `keep[l, h]` tokens. With it (Ada-KV,
    https://arxiv.org/abs/2407.11550, algorithm 1) the heads of a layer share `sum(keep[l])` tokens: each is
    sure of its best `floor[l, h]`, and the rest go to the highest scores of all heads together. Of equal
    scores the lower position wins, then the lower head. A head, or a layer, with fewer tokens than it may
    keep keeps all of them.

    Args:
        scores: float32 [L, H, n], no NaN; read up to a head's length only.
        lengths: int32 [L, H], tokens of each head.
        keep: int32 [L, H], tokens to keep.
        floor: int32 [L, H], tokens each head is sure of; at most `sum(keep[l])` per layer.

    Returns:
        indices: int32 [L, H, n], ascending indices of the kept tokens, -1 past a head's count. So wide that
            nobody has to wait for the counts.
        counts: int32 [L, H], tokens kept.
    """
    layers, heads, width = scores.shape
    stored = torch.arange(width, device=scores.device) < lengths[..., None]
    if floor is None:
        kept = stored & (_rank(scores, stored) < keep[..., None])
    else:
        sure = stored & (_rank(scores, stored) < floor[..., None])
        left = (keep.sum(1) - sure.sum((1, 2)))[:, None]
        others, candidates = (x.transpose(1, 2).reshape(layers, -1) for x in (scores, stored & ~sure))
        rest = candidates & (_rank(others, candidates) < left)
        kept = sure | rest.reshape(layers, width, heads).transpose(1, 2)
    counts = kept.sum(-1)
    indices = torch.where(kept, torch.arange(width, device=scores.device), width)
    indices = indices.sort(-1).values
    return indices.masked_fill(indices == width, -1).int(), counts.int()


def _rank(scores: Tensor, candidates: Tensor) -> Tensor:
    """Place of each entry [..., n] among the candidates, by score, then index; the other entries are last."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    candidates_first = (~candidates).int().gather(-1, order).argsort(dim=-1, stable=True)
    return order.gather(-1, candidates_first).argsort(-1)
