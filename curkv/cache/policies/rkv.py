"""R-KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.declarations import SHARE, option
from curkv.cache.policies.base import POOLING, pooled
from curkv.cache.policies.snapkv import ObservingPolicy
from curkv.cache.view import CacheView
from curkv.kernels.paged_decode_attention.reference import softcapped

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

_ALIKE = 0.5
"""Cosine of two keys from which they say the same."""

_ROWS = 512
"""Keys that are held against all others at once."""


@dataclass(frozen=True, kw_only=True)
class RKV(ObservingPolicy):
    """R-KV (https://arxiv.org/abs/2505.24133, section 3, as released): attention, less what others say too.

    A token's importance is the attention of the last `observation` = 8 tokens to those before them, each
    query's logits being the largest of the group; mean over the queries, largest of `pool` = 7 neighbours.
    Its redundancy is the mean cosine of its key and all others, softmax over the head, where of the keys like
    another one the newest does not count as its copy. The score is `importance` = 0.1 times the first less
    0.9 times the second. Meant for long answers.
    """

    name: str = "r-kv"
    description: str = "R-KV: attention of the last 8 tokens, less how much other keys say the same"
    observation: int = 8
    pool: int = option(7, POOLING, "Odd size of the pooling over a head's scores; 1 is off.")
    importance: float = option(0.1, SHARE, "Weight of R-KV's attention beside redundancy.")

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by attention and redundancy."""
        heads, window = view.lengths.shape[1], view.newest(self.observing)
        judged, queries = view.stored & ~window, self.queries(view)
        queries = queries.view(view.num_layers, heads, *queries.shape[1:])
        paid, copies = [], []
        for layer in range(view.num_layers):
            keys = view.keys(layer)
            logits = torch.einsum("hwgd,hnd->hwgn", queries[layer], keys) * view.scale
            logits = softcapped(logits, view.softcap).amax(2)
            logits.masked_fill_(~judged[layer, :, None], -torch.inf)
            paid.append(logits.softmax(-1).nan_to_num_(0.0).mean(1))
            copies.append(_redundancy(keys, view.stored[layer]))
        attention = pooled(torch.stack(paid), judged, self.pool, "max")
        scores = self.importance * attention - (1 - self.importance) * torch.stack(copies)
        return scores.masked_fill_(~view.stored, -torch.inf).masked_fill_(window, torch.inf)


def _redundancy(keys: Tensor, stored: Tensor) -> Tensor:
    """How much the other keys say the same as each: float32 [H, n], a head's sum to 1.

    Args:
        keys: float32 [H, n, head_dim], 0 where nothing is stored.
        stored: bool [H, n].
    """
    unit, heads = F.normalize(keys, dim=-1), len(keys)
    place = torch.arange(keys.shape[1], device=keys.device)
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for start in range(0, keys.shape[1], _ROWS):
        own = place[start : start + _ROWS, None].expand(heads, -1, 1)
        cosines = (unit[:, start : start + _ROWS] @ unit.transpose(1, 2)).scatter_(2, own, 0.0)
        newest = (cosines > _ALIKE).float().mul_(place).amax(2, keepdim=True).long()
        total += cosines.scatter_(2, newest, 0.0).sum(1)
    counts = stored.sum(-1, keepdim=True).clamp_min(1)
    return (total / counts).masked_fill(~stored, -torch.inf).softmax(-1).nan_to_num_(0.0)
