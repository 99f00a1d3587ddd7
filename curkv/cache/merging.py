"""Merging what is evicted into what is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.view import CacheView

_BLOCK = 4096
"""Tokens whose keys are compared with the kept ones at once: all with all would take gigabytes."""


def merged(view: CacheView, layer: int, indices: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """Fold the values of evicted tokens into those of the kept ones whose keys are most like theirs.

    As in kvpress's `MergingPress`, after D2O (https://arxiv.org/abs/2406.13035): each evicted token goes to
    one kept token of its head, or to none if no key is similar enough. Beside the kept value, which weighs 1,
    its value weighs the cosine of the keys times ||v|| / (||v|| + ||v of the kept token||). Keys stay: the
    average of two that RoPE has turned differently is like neither.

    Args:
        view: The sequence before the eviction.
        layer: Index of the layer.
        indices: int32 [H, m], ascending indices of the tokens that each head keeps, -1 past its count.
        counts: int32 [H], how many.
        threshold: Least cosine of two keys whose values are merged.

    Returns:
        Values of the kept tokens, float32 [H, m, head_dim].
    """
    keys, values = view.keys(layer), view.values(layer)
    kept = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    place = indices.long().clamp_min(0)
    evicted = view.stored[layer].scatter(1, place.where(kept, place[:, :1]), False)
    own = place[..., None].expand(-1, -1, keys.shape[2])
    directions = F.normalize(keys.gather(1, own), dim=-1).transpose(1, 2)
    blocks = torch.split(F.normalize(keys, dim=-1), _BLOCK, dim=1)
    nearest = [(block @ directions).masked_fill_(~kept[:, None], -torch.inf).max(-1) for block in blocks]
    alike, target = (torch.cat(parts, 1) for parts in zip(*nearest, strict=True))
    length = values.norm(dim=-1)
    theirs = length.gather(1, place.gather(1, target))
    weight = alike.clamp_min(0.0) * (evicted & (alike >= threshold)) * length
    weight /= (length + theirs).clamp_min(1e-30)
    total = torch.ones_like(kept, dtype=weight.dtype).scatter_add_(1, target, weight)
    into = target[..., None].expand_as(values)
    return values.gather(1, own).scatter_add_(1, into, weight[..., None] * values) / total[..., None]
