"""SnapKV and what differs from it in the allocation alone: Ada-SnapKV and PyramidKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS
from curkv.cache.declarations import Choice, Integer, option
from curkv.cache.observations import Needs
from curkv.cache.policies.base import Policy, PooledPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class ObservingPolicy(Policy):
    """A policy that reads the attention of the newest tokens, which are kept."""

    observation: int = option(32, Integer(1, 4096), "Newest tokens whose queries judge the others.")

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=self.observation)

    @property
    def observing(self) -> int:
        """The tokens of the window."""
        return self.observation

    def queries(self, view: CacheView) -> Tensor:
        """The queries that observe: float32 [L * H, w, group, head_dim], after RoPE."""
        return view.queries(self.observation)

    def attention(self, view: CacheView, kernels: Kernels, reduction: Literal["mean", "max"]) -> Tensor:
        """Attention that every token receives from the window: float32 [L, H, n_max], mean over the group.

        Args:
            view: The sequence.
            kernels: Operations on pages.
            reduction: What counts of the queries of the window.
        """
        scores = kernels.window_scores(
            self.queries(view),
            view.pages,
            *view.rows,
            view.scale,
            reduction,
            width=view.width,
            softcap=view.softcap,
            sinks=view.sink_rows,
        )
        return scores.view(*view.lengths.shape, view.width)


@dataclass(frozen=True, kw_only=True)
class AttentionPolicy(ObservingPolicy):
    """A policy that reads the attention of several of the newest tokens."""

    reduction: Literal["mean", "max"] = option(
        "mean", Choice(("mean", "max")), "What counts of the observed queries' attention.", yields=True
    )


@dataclass(frozen=True, kw_only=True)
class SnapKV(AttentionPolicy, PooledPolicy):
    """SnapKV (https://arxiv.org/abs/2404.14469, section 4): what the last queries of the prompt look at.

    The score is the attention of the last `observation` = 32 tokens, mean over them and the group of query
    heads, pooled over 5 neighbours (kvpress: 64 and 5; KVCache-Factory: 8 and 7, max). The observing tokens
    are kept.
    """

    name: str = "snapkv"
    description: str = "SnapKV: tokens that the last 32 tokens attend to"
    pool: int = 5
    pool_kind: Literal["max", "mean"] = "mean"
    factor = True

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by the attention of the window."""
        return self.attention(view, kernels, self.reduction)


ADA_SNAPKV = SnapKV(
    name="adasnapkv",
    description="Ada-SnapKV: SnapKV's scores, heads of a layer compete for its tokens above a floor",
    allocation=ALLOCATIONS["adaptive"],
)
"""SnapKV's scores with Ada-KV's allocation (https://arxiv.org/abs/2407.11550, algorithm 1)."""

PYRAMIDKV = SnapKV(
    name="pyramidkv",
    description="PyramidKV: SnapKV's scores, lower layers keep more",
    allocation=ALLOCATIONS["pyramid"],
)
"""SnapKV's scores with PyramidKV's budgets (https://arxiv.org/abs/2406.02069, section 3.2)."""
