"""ChunkKV."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curkv.cache.declarations import Choice, Integer, option, options_of
from curkv.cache.observations import Needs
from curkv.cache.policies.base import Policy
from curkv.cache.policies.curdkv import CurDKV, LeveragePolicy
from curkv.cache.policies.snapkv import AttentionPolicy, SnapKV
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

CHUNK = Integer(1, 4096)
"""Lengths of chunks and passages."""

_SCORERS: dict[str, Policy] = {"snapkv": SnapKV(), "curdkv": CurDKV()}


@dataclass(frozen=True, kw_only=True)
class ChunkKV(AttentionPolicy, LeveragePolicy):
    """ChunkKV (https://arxiv.org/abs/2502.00299, algorithm 1): chunks of `chunk` = 20 tokens are kept whole.

    A chunk's score is the mean over its tokens of the sum over heads of another policy's scores, SnapKV's or
    CurDKV's (`scorer`). The last chunk that the budget reaches is kept in part, its first tokens, so that the
    budget is met exactly. A chunk with a token of SnapKV's window is kept.
    """

    name: str = "chunkkv"
    description: str = "ChunkKV: whole chunks of 20 tokens, by SnapKV's or CurDKV's scores"
    scorer: Literal["snapkv", "curdkv"] = option(
        "snapkv", Choice(tuple(_SCORERS)), "Whose scores ChunkKV takes."
    )
    chunk: int = option(20, CHUNK, "Tokens of ChunkKV's chunks.")
    heads_compete = False

    @cached_property
    def scored_by(self) -> Policy:
        """The scorer, with the options that it shares with this policy."""
        own = {name: getattr(self, name) for name in options_of(type(self))}
        return _SCORERS[self.scorer].configured(own, self.preset)

    @property
    def needs(self) -> Needs:
        """What the scorer needs."""
        return self.scored_by.needs

    @property
    def observing(self) -> int:
        """That of the scorer."""
        return self.scored_by.observing

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by their chunk."""
        scores = self.scored_by.score(view, kernels)
        stored = view.stored
        # Heads of a layer hold as many tokens as each other, since they always keep the same ones.
        by_layer = view.whole(scores.masked_fill(~stored, 0.0)).sum(1)
        chunk = torch.arange(view.width, device=scores.device) // self.chunk
        chunks = -(-view.width // self.chunk)
        sums = by_layer.new_zeros(view.num_layers, chunks).index_add_(1, chunk, by_layer)
        counts = sums.new_zeros(sums.shape).index_add_(1, chunk, stored[:, 0].to(sums.dtype))
        means = (sums / counts.clamp_min(1))[:, chunk]
        spread = means[:, None].expand_as(scores).masked_fill(~stored, -torch.inf)
        return spread.masked_fill_(view.newest(self.observing), torch.inf) if self.observing else spread
