"""From a plan and a sequence's cache to the tokens that every head keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.merging import merged
from curkv.cache.page_manager import Kept, PageManager
from curkv.cache.plan import EvictionPlan
from curkv.cache.policies.base import Scored
from curkv.cache.upload import upload
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


def select(view: CacheView, plan: EvictionPlan, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Select the tokens to keep: score, pool, protect, allocate.

    Sinks, newest tokens and protected spans are found by their position in the text, wherever earlier
    evictions have moved them; they count towards the budget.

    Args:
        view: The sequence, its phase and round; this step's tokens are stored and attended to.
        plan: What the request asked for.
        kernels: Operations on pages.

    Returns:
        indices: int32 [L, H, n_max], ascending indices of each head's kept tokens, -1 past its count.
        counts: int32 [L, H]. All tokens, if the cache holds no more than the budget.
        Of several processes that share the heads, both are of the heads of all.
    """
    k = plan.budget_tokens if view.phase == "prefill" else plan.decode_budget_tokens
    if k is None:
        raise ValueError("the plan has no decode budget")
    view = replace(view, seed=plan.seed, budget=k, frame=plan.frame_tokens)
    always = protected(view, plan)
    return select_scored(view, plan, plan.policy.judge(view, kernels), always, kernels)


def select_scored(
    view: CacheView, plan: EvictionPlan, scored: Scored, always: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Select the tokens to keep of what the plan's policy has scored.

    Args:
        view: The sequence; its `budget` is what is kept per head, on average.
        plan: What the request asked for.
        scored: The policy's scores, written over.
        always: bool [L, H, n_max], tokens that are kept in any case.
        kernels: Operations on pages.

    Returns:
        As `select`.
    """
    scores = scored.scores
    if scored.chosen is not None:
        scores = scores.masked_fill_(~scored.chosen, -torch.inf)
    # What a policy wants in any case comes after what the request does.
    scores = scores.clamp_(max=torch.finfo(scores.dtype).max).masked_fill_(always, torch.inf)
    whole = view.whole(scores), view.of_all_heads, view.whole(always)
    return plan.policy.allocation.seeing(view).select(*whole, kernels)


@dataclass(frozen=True)
class Eviction:
    """What is to be kept of a sequence.

    Attributes:
        slot: The sequence.
        view: Of that sequence or of the one it was forked from.
        plan: What the request asked for.
        indices: int32 [L, H, n], as `select` gives them.
        counts: int32 [L, H].
    """

    slot: int
    view: CacheView
    plan: EvictionPlan
    indices: Tensor
    counts: Tensor

    def merged(self, most: int) -> list[Tensor]:
        """By layer: kept values after the others were merged into them; none if that is not wanted.

        Args:
            most: How many the head keeps that keeps most.
        """
        threshold, view = self.plan.options.merge_threshold, self.view
        if threshold is None:
            return []
        indices, counts = view.own(self.indices)[..., :most], view.own(self.counts)
        return [merged(view, i, indices[i], counts[i], threshold) for i in range(view.num_layers)]


def evict(kv: PageManager, evictions: Sequence[Eviction]) -> list[int]:
    """Keep the chosen tokens of sequences, after merging the others into them where a plan says so.

    A device is waited for once, however many they are.

    Args:
        kv: The cache.
        evictions: Of different sequences.

    Returns:
        Pages freed of each, less the fresh ones taken.

    Raises:
        OutOfPages: shared pages cannot be copied; nothing is changed.
    """
    all_counts = torch.stack([one.counts for one in evictions]).numpy(force=True)
    merges = [one.merged(int(counts.max())) for one, counts in zip(evictions, all_counts, strict=True)]
    kept = zip(evictions, all_counts, strict=True)
    freed = kv.evict_together([Kept(one.slot, one.indices, counts) for one, counts in kept])
    for one, layers in zip(evictions, merges, strict=True):
        for layer, values in enumerate(layers):
            kv.overwrite(one.slot, layer, None, values)
    return freed


def protected(view: CacheView, plan: EvictionPlan) -> Tensor:
    """Tell which stored tokens the plan always keeps: bool [L, H, n]."""
    recent = plan.recent_tokens if view.phase == "prefill" else plan.decode_recent_tokens
    spans = [(0, plan.sink_tokens), *plan.protect]
    past = max(end for _, end in spans)
    named = torch.zeros(past + 1, dtype=torch.bool)
    for start, end in spans:
        named[start:end] = True
    # Index -1, past a head's length, is that of the last place, as are all positions past the spans.
    position = view.position.clamp_(max=past)
    return upload(named, position.device)[position] | view.newest(recent)
