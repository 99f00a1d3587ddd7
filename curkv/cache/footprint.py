"""How many pages a request needs: the one estimate by which it is refused, admitted, or made to wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from curkv.cache.layout import CacheLayout
    from curkv.cache.page_manager import PageManager
    from curkv.cache.plan import EvictionPlan
    from curkv.cache.prefixes import Prefix


def footprint(kv: PageManager, plan: EvictionPlan, generated: int, prefix: Prefix | None = None) -> int:
    """Most pages that a sequence takes until its prompt and some tokens behind it are stored.

    Pages of its prefix that running sequences own are not taken again, but an eviction of the prompt copies
    what it keeps of them. To begin with, the prefix's last pages are there twice, see `PageManager.adopt`.

    Args:
        kv: The cache.
        plan: Of its request.
        generated: Tokens stored behind the prompt; the last one that is generated never is.
        prefix: What it starts from.

    Returns:
        The number of pages. Never too few for a sequence that shares nothing, and exact where all heads hold
        equally many tokens.
    """
    layout, peak, ragged = kv.layout, plan.peak_prompt_tokens, plan.ragged and plan.streaming
    seen = plan.prompt_tokens + plan.tokens_behind(plan.context_tokens)
    if prefix is not None and prefix.evictions:
        held = float(prefix.lengths[list(layout.evicted_rows)].mean())
        peak, ragged = plan.peak_tokens_behind(prefix.tokens, held, prefix.evicted_at), plan.ragged
    needed = max(
        layout.sequence_pages(peak, ragged=ragged, seen=seen),
        held_pages(layout, plan, generated),
    )
    if prefix is None:
        return needed
    pages, windows = prefix.pages, [row for row, window in enumerate(layout.windows) if window is not None]
    if windows:  # one may have moved past its layer's
        pages = pages[np.isin(pages, np.delete(prefix.table, windows, axis=0))]
    shared = int((kv.pool.owners[pages] > kv.pool.held[pages]).sum())
    evicts = plan.evicts_prompt and prefix.tokens < plan.context_tokens
    copied = layout.sequence_pages(plan.budget_tokens) if shared and evicts else 0
    return max(needed - shared + copied, kv.pages_to_adopt(prefix, plan.observed))


def held_pages(layout: CacheLayout, plan: EvictionPlan, generated: int) -> int:
    """Most pages that a sequence holds from the last eviction of its prompt on; see `footprint`."""
    tokens, interval = plan.kept_prompt_tokens + generated, plan.options.decode_interval
    if plan.decode_budget_tokens is not None:
        tokens = min(tokens, max(plan.decode_budget_tokens, plan.kept_prompt_tokens) + interval)
    return layout.sequence_pages(tokens, ragged=plan.ragged, seen=plan.prompt_tokens + generated)
