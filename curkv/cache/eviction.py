"""From a plan and a sequence's cache to the tokens that every head keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.merging import merged
from curkv.cache.options import EvictionOptions
from curkv.cache.plan import EvictionPlan
from curkv.cache.policies import get_policy
from curkv.cache.policies.base import CacheView

if TYPE_CHECKING:
    from curkv.cache.page_manager import PageManager
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
    view = replace(view, seed=plan.seed, budget=k)
    return choose(view, plan, plan_scores(view, plan, kernels), kernels)


def plan_scores(view: CacheView, plan: EvictionPlan, kernels: Kernels) -> Tensor:
    """Score the stored tokens as a plan says: float32 [L, H, n], protected ones +inf, -inf past a length."""
    return combined_scores(view, plan, kernels).masked_fill_(protected(view, plan), torch.inf)


def choose(view: CacheView, plan: EvictionPlan, scores: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Share the view's budget out among layers and heads, and keep the best of each.

    Args:
        view: The sequence; its `budget` is what is kept per head, on average.
        plan: What the request asked for.
        scores: float32 [L, H, n], of `plan_scores`.
        kernels: Operations on pages.

    Returns:
        As `plan_kept`.
    """
    if plan.options.allocation == "pyramid":
        always = int(protected(view, plan).sum(-1).max())
        keep = pyramid(view, view.budget, always, plan.options)
    else:
        keep = torch.full_like(view.lengths, view.budget)
    floor = None
    if plan.options.allocation == "adaptive":
        alpha = plan.options.alpha
        floor = torch.maximum((alpha * keep).int(), torch.full_like(keep, alpha > 0))
    return kernels.select(scores, view.lengths, keep, floor)


def evict(
    kv: PageManager, slot: int, view: CacheView, plan: EvictionPlan, indices: Tensor, counts: Tensor
) -> int:
    """Keep the chosen tokens, after merging the others into them if the plan says so.

    Args:
        kv: The cache.
        slot: The sequence.
        view: Of that sequence or of the one it was forked from.
        plan: What the request asked for.
        indices: int32 [L, H, n], as `plan_kept` gives them.
        counts: int32 [L, H].

    Returns:
        Pages freed, less the fresh ones taken.

    Raises:
        OutOfPages: shared pages cannot be copied; nothing is changed.
    """
    if plan.options.merge == "none":
        return kv.evict(slot, indices, counts)
    threshold = plan.options.merge_threshold
    layers = [merged(view, i, indices[i], counts[i], threshold) for i in range(view.num_layers)]
    freed = kv.evict(slot, indices, counts)
    for layer, (k, v) in enumerate(layers):
        kv.overwrite(slot, layer, k, v)
    return freed


def combined_scores(view: CacheView, plan: EvictionPlan, kernels: Kernels) -> Tensor:
    """Scores of the plan's policy, times those of a second one if it names one: float32 [L, H, n]."""
    options = plan.options
    scores = plan.policy.scores(view, options, kernels)
    if options.times is not None:
        second = replace(options, pool=options.times_pool, pool_kind="max")
        factor = get_policy(options.times).scores(view, second, kernels)
        scores = torch.where(scores.isfinite() & factor.isfinite(), scores * factor, scores)
    return scores


def pyramid(view: CacheView, k: int, always: int, options: EvictionOptions) -> Tensor:
    """Budgets that fall linearly over the layers, their mean exactly k (PyramidKV, section 3.2).

    Beside `always` tokens that every layer keeps, the last layer gets 1 / beta of the mean and the first one
    as much more; if that exceeds what there is, the slope is less. Under preset "kvpress" nothing is set
    aside.

    Returns:
        int32 [L, H].
    """
    layers, length = view.num_layers, view.width
    base = k - always if options.preset != "kvpress" else k
    top = min(2 * base - base / options.beta, length - always)
    bottom = 2 * base - top
    steps = torch.linspace(top, bottom, layers, dtype=torch.float64)
    ends = (steps.cumsum(0) + 1e-9).round().long()
    budgets = ends.diff(prepend=ends.new_zeros(1)) + (k - base)
    return budgets.int().to(view.lengths.device)[:, None].expand(view.lengths.shape).contiguous()


def protected(view: CacheView, plan: EvictionPlan) -> Tensor:
    """Tell which stored tokens the plan always keeps: bool [L, H, n]."""
    position = view.position
    tokens = int(position.max()) + 1
    recent = plan.recent_tokens if view.phase == "prefill" else plan.decode_recent_tokens
    always = torch.zeros(tokens + 1, dtype=torch.bool, device=position.device)
    for start, end in ((0, plan.sink_tokens), (max(0, tokens - recent), tokens), *plan.protect):
        always[start : min(end, tokens)] = True
    return always[position]
