"""LaCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.declarations import Integer, option
from curkv.cache.policies.base import Policy, Published
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class LaCache(Policy):
    """LaCache (https://arxiv.org/abs/2507.14204, section 3): a ladder over layers and tokens.

    Every layer keeps another band of each stretch of `ladder` = 256 stored tokens, shifted evenly from the
    first layer to the last, so that together the layers cover the text. Tokens count by where they are
    stored, so that a further eviction thins out what is old again (iterative compaction).
    """

    name: str = "lacache"
    description: str = "LaCache: a ladder-shaped pattern, every layer keeps other tokens"
    published: Published = Published(sinks=4)
    ladder: int = option(256, Integer(2), "Tokens over which LaCache's pattern repeats.")
    heads_compete = False

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by their distance from the layer's rung."""
        device = view.lengths.device
        place = torch.arange(view.width, device=device) % self.ladder / self.ladder
        rung = torch.arange(view.num_layers, device=device)[:, None] / view.num_layers
        around = (place - rung).abs()
        distance = torch.minimum(around, 1 - around)
        return -distance[:, None].expand(view.stored.shape).masked_fill(~view.stored, torch.inf)
