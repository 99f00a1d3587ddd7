"""Merging what is evicted into what is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.view import CacheView

_BLOCK = 4096
"""Tokens whose keys are compared with the kept ones at once: all with all would take gigabytes."""


def merged(
    view: CacheView, layer: int, indices: Tensor, counts: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Average every kept token with the evicted ones whose keys are most like its own.

    As in KVMerger (https://arxiv.org/abs/2407.08454, section 3.3) keys and values are weighted with a
    Gaussian of the distance of the keys, 1 for the kept token itself, whose width is the mean distance; as in
    EMS (https://arxiv.org/abs/2412.08521, section 4) the choice of what is kept comes first and each evicted
    token goes to one kept token of its head, or to none if no key is similar enough.

    Args:
        view: The sequence before the eviction.
        layer: Index of the layer.
        indices: int32 [H, m], ascending indices of the tokens that each head keeps, -1 past its count.
        counts: int32 [H], how many.
        threshold: Least cosine of two keys that are merged.

    Returns:
        Keys and values of the kept tokens, float32 [H, m, head_dim] each.
    """
    keys, values = view.keys(layer), view.values(layer)
    kept = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    place = indices.long().clamp_min(0)
    evicted = view.stored[layer].scatter(1, place.where(kept, place[:, :1]), False)
    own = place[..., None].expand(-1, -1, keys.shape[2])
    kept_keys = keys.gather(1, own)
    directions = F.normalize(kept_keys, dim=-1).transpose(1, 2)
    blocks = torch.split(F.normalize(keys, dim=-1), _BLOCK, dim=1)
    nearest = [(block @ directions).masked_fill_(~kept[:, None], -torch.inf).max(-1) for block in blocks]
    best, target = (torch.cat(parts, 1) for parts in zip(*nearest, strict=True))
    goes = evicted & (best >= threshold)
    distance = (keys - kept_keys.gather(1, target[..., None].expand_as(keys))).square().sum(-1)
    width = (distance * goes).sum(1, keepdim=True) / goes.sum(1, keepdim=True).clamp_min(1)
    weight = (distance / (-2 * width.clamp_min(1e-30))).exp() * goes
    total = torch.ones_like(kept, dtype=weight.dtype).scatter_add_(1, target, weight)[..., None]
    into = target[..., None].expand_as(keys)
    key, value = (
        x.gather(1, own).scatter_add_(1, into, weight[..., None] * x) / total for x in (keys, values)
    )
    return key, value
