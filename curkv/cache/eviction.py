"""From a plan and a sequence's cache to the tokens that every head keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.options import EvictionPlan
from curkv.cache.policies.base import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


def plan_kept(view: CacheView, plan: EvictionPlan, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Choose the tokens to keep: score, pool, protect, allocate.

    Sinks, newest tokens and protected spans are found by their position in the text, wherever earlier
    evictions have moved them; they count towards the budget.

    Args:
        view: The sequence, its phase and round; this step's tokens are stored and attended to.
        plan: What the request asked for.
        kernels: Operations on pages.

    Returns:
        indices: int32 [L, H, max(counts)], ascending indices of each head's kept tokens, -1 past its count.
        counts: int32 [L, H]. All tokens, if the cache holds no more than the budget.
    """
    k = plan.budget_tokens if view.phase == "prefill" else plan.decode_budget_tokens
    if k is None:
        raise ValueError("the plan has no decode budget")
    view = replace(view, seed=plan.seed)
    scores = plan.policy.score(view, plan.options, kernels)
    scores = pooled(scores, view.stored, plan.options.pool or 1, plan.options.pool_kind)
    scores.masked_fill_(protected(view, plan), torch.inf)
    keep = torch.full_like(view.lengths, k)
    floor = None
    if plan.policy.allocation == "adaptive":
        floor = torch.full_like(keep, max(int(plan.options.alpha * k), plan.options.alpha > 0))
    return kernels.select(scores, view.lengths, keep, floor)


def pooled(scores: Tensor, stored: Tensor, kernel: int, kind: Literal["max", "mean"]) -> Tensor:
    """Pool scores over neighbouring stored tokens, so that spans are kept whole (SnapKV, section 4).

    Args:
        scores: float32 [L, H, n], -inf past a head's length.
        stored: bool [L, H, n], False past a head's length.
        kernel: Odd number of tokens; 1 changes nothing.
        kind: "max", or "mean" over those of the neighbours that exist.

    Returns:
        float32 [L, H, n], -inf past a head's length.
    """
    if kernel == 1:
        return scores
    if kind == "max":
        scores = F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    else:
        sums, counts = (
            F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)
            for x in (scores.masked_fill(~stored, 0), stored.to(scores.dtype))
        )
        scores = sums / counts
    return scores.masked_fill(~stored, -torch.inf)


def protected(view: CacheView, plan: EvictionPlan) -> Tensor:
    """Tell which stored tokens the plan always keeps: bool [L, H, n]."""
    position = view.gather(view.pages.position, -1)
    tokens = int(position.max()) + 1
    recent = plan.recent_tokens if view.phase == "prefill" else plan.decode_recent_tokens
    always = torch.zeros(tokens + 1, dtype=torch.bool, device=position.device)
    for start, end in ((0, plan.sink_tokens), (max(0, tokens - recent), tokens), *plan.protect):
        always[start : min(end, tokens)] = True
    return always[position]
