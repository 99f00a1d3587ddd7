"""SnapCUR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.allocation import ALLOCATIONS, Allocation
from curkv.cache.declarations import SHARE, Integer, option
from curkv.cache.policies.base import best_of_heads, pooled
from curkv.cache.policies.chunkkv import CHUNK
from curkv.cache.policies.curdkv import LeveragePolicy
from curkv.cache.policies.snapkv import SnapKV
from curkv.cache.presets import Leverage
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class SnapCur(SnapKV, LeveragePolicy):
    """What the last tokens look at: passages weighed with CUR's leverage, then single tokens.

    A token's attention is the most that any query of the window pays it, as in DefensiveKV. Where fewer than
    `draft_below` = 160 tokens are kept, it is that or what any of the first `draft` = 16 tokens of an answer
    pays it, which the model drafts with the whole cache, as in Lookahead Q-Cache
    (https://arxiv.org/abs/2505.20334): what copies a fact looks for it only when it is due. The window is
    short: in texts that repeat themselves, queries of the text before the question look at whatever is like
    it, and take the room of what is asked for. A `first_stage` = half of the budget beside the window goes
    to passages that all heads of a layer keep, because the head that finds a passage need not be the one
    that has to read it: attention times leverage (CurDKV's, of values alone: ||v||^2, normalised per head),
    summed over the heads and averaged over `chunk` = 25 neighbours. Tokens of a
    conversation's frame (`CacheView.frame`) count for no passage: they draw attention whatever is said. The
    rest goes to the tokens with the most attention, mean over 5 neighbours; heads of all layers compete.

    The best policy measured here for requests whose question is part of the prompt (docs/policies.md).
    """

    name: str = "snapcur"
    description: str = (
        "attention, of a drafted answer too, and passages by attention times leverage: for ordinary requests"
    )
    allocation: Allocation = ALLOCATIONS["global"]
    observation: int = 16
    reduction: Literal["mean", "max"] = "max"
    leverage: Leverage = "norm"
    combine: Literal["product", "mean", "key", "value"] = "value"
    chunk: int = option(25, CHUNK, "Tokens of SnapCUR's passages.")
    first_stage: float = option(0.5, SHARE, "Share of the budget that SnapCUR gives to passages.")
    draft: int = option(
        16, Integer(0, 256), "Tokens of an answer that SnapCUR drafts at the end of the prompt; 0: none."
    )
    draft_below: int = option(
        160, Integer(0, 1_000_000), "Tokens kept per head from which on SnapCUR drafts no answer."
    )
    factor = False

    def drafts(self, budget: int) -> int:
        """A draft where little is kept: it takes as many decode steps before the first token."""
        return self.draft if budget < self.draft_below else 0

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Each head's attention, pooled; tokens of the best passages and of the window are +inf."""
        window = view.newest(self.observing)
        judged = view.stored & ~window
        attention = self.score_tokens(view, kernels)
        if view.draft is not None:
            attention = torch.maximum(attention, view.draft)
        weighed = attention * self.leverage_scores(view, kernels)
        weighed = weighed.masked_fill(~judged | (view.position < view.frame), 0.0)
        passages = self._passages(view, weighed).masked_fill(~judged, -torch.inf)
        room = max(0, view.budget - self.observing)
        first = torch.full_like(view.lengths, int(self.first_stage * room))
        single = pooled(attention, judged, self.pool, self.pool_kind)
        return single.masked_fill(window | best_of_heads(passages, first, view, kernels), torch.inf)

    def _passages(self, view: CacheView, scores: Tensor) -> Tensor:
        """Mean over the `chunk` positions around each token of the sum of all heads' scores.

        Heads may hold different tokens, so the sums are taken by position.

        Args:
            view: The sequence.
            scores: float32 [L, H, n], 0 for tokens that are not judged.

        Returns:
            float32 [L, H, n].
        """
        position = view.position.clamp_min(0).long().flatten(1)
        text = scores.new_zeros(len(scores), int(position.max()) + 1)
        text = view.ranks.sum(text.scatter_add_(1, position, scores.flatten(1)))
        ahead = (self.chunk - 1) // 2
        smooth = F.avg_pool1d(F.pad(text, (self.chunk - 1 - ahead, ahead)), self.chunk, stride=1)
        return smooth.gather(1, position).view_as(scores)
