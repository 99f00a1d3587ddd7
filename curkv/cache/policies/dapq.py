"""DapQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.view import CacheView


@dataclass(frozen=True, kw_only=True)
class DapQ(SnapKV):
    """DapQ, decoding-aligned pseudo queries: SnapKV with queries at the positions that the answer will have.

    What such a query asks matters less than where it stands: the last `observation` = 32 queries are turned
    ahead by as many positions (RoPE turns add up), which puts them right behind the prompt.
    """

    name: str = "dapq"
    description: str = "DapQ: SnapKV with its queries moved to the positions of the answer"

    def queries(self, view: CacheView) -> Tensor:
        """The window's queries, moved behind the prompt."""
        assert view.rope is not None
        queries = super().queries(view)
        heads = len(queries) // view.num_layers
        ahead = min(queries.shape[1], len(view.rope[0][0]) - 1)
        cos, sin = (
            torch.stack(tables).repeat_interleave(heads, 0)[:, None, None]
            for tables in zip(*((cos[ahead], sin[ahead]) for cos, sin in view.rope), strict=True)
        )
        first, second = queries.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
