"""What an eviction would keep of a sequence, and what it would cost, without evicting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from curkv.cache.eviction import protected, select_scored
from curkv.cache.layout import longest
from curkv.cache.observations import Needs
from curkv.cache.plan import EvictionPlan
from curkv.cache.policies.base import Scored
from curkv.cache.view import CacheView
from curkv.kernels.paged_decode_attention.reference import softcapped, with_sinks

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels

OBSERVED_QUERIES = 32
"""Last queries that stand for those to come; SnapKV's observation window is as long."""

NEEDS = Needs(queries=OBSERVED_QUERIES)
"""What has to be observed beside what the policies need."""


@dataclass(frozen=True)
class Explanation:
    """What one plan would do to a prompt of n tokens.

    Attributes:
        policy: name of the policy.
        budget_tokens: tokens per head, on average, that the plan keeps.
        kept: bool [L, H, n].
        ranks: uint8 [L, H, n], each token's rank among its head's scores, 255 highest.
        errors: float32 [L, H], relative error of the attention output of the last queries.
        bytes_full: bytes of the pages that are held.
        bytes_kept: bytes of the pages that would be held.
    """

    policy: str
    budget_tokens: int
    kept: NDArray[np.bool_]
    ranks: NDArray[np.uint8]
    errors: NDArray[np.float32]
    bytes_full: int
    bytes_kept: int


@torch.no_grad()
def explain(view: CacheView, plan: EvictionPlan, kernels: Kernels, page_bytes: int) -> Explanation:
    """Asks a plan about a whole prompt.

    Args:
        view: the sequence, after its last prompt token, with nothing evicted and its queries observed.
        plan: resolved for this prompt.
        kernels: operations on pages.
        page_bytes: bytes of a page.

    Returns:
        The explanation; merging is left out of it.
    """
    view = replace(view, seed=plan.seed, budget=plan.budget_tokens, frame=plan.frame_tokens)
    scored, always = plan.policy.judge(view, kernels), protected(view, plan)
    ranks, kept = _ranks(scored, always), view.stored
    if plan.evicts_prompt:
        indices, counts = select_scored(view, plan, scored, always, kernels)
        kept = _as_mask(view.own(indices), view.own(counts), view.width)
    size, position, tables = view.pages.page_size, view.position, view.lengths.shape[1]
    held = [view.whole(x).numpy(force=True) for x in (view.lengths, kept.sum(-1))]
    pages = [int((-(-longest(lengths, tables) // size)).sum()) for lengths in held]
    return Explanation(
        policy=plan.policy.name,
        budget_tokens=plan.budget_tokens,
        kept=view.whole(_by_position(kept, position)).numpy(force=True),
        ranks=view.whole(_by_position(ranks, position)).numpy(force=True),
        errors=view.whole(output_errors(view, kept)).numpy(force=True),
        bytes_full=pages[0] * page_bytes,
        bytes_kept=pages[1] * page_bytes,
    )


def _as_mask(indices: Tensor, counts: Tensor, n: int) -> Tensor:
    """bool [L, H, n] of the kept tokens, from ascending indices [L, H, m] that are -1 past their counts."""
    chosen = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    places = indices.long().where(chosen, n)
    mask = torch.zeros(*counts.shape, n + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, places, True)[..., :n]


def _by_position(values: Tensor, position: Tensor) -> Tensor:
    """[L, H, prompt], what stored tokens have by their place in the text; 0 for those that windows left."""
    prompt = int(position.max()) + 1
    places = position.long().where(position >= 0, prompt)
    return values.new_zeros(*values.shape[:2], prompt + 1).scatter_(-1, places, values)[..., :prompt]


def _ranks(scored: Scored, protected: Tensor) -> Tensor:
    """uint8 [L, H, n]: equal scores have one rank, protected tokens (also those of +inf) the highest."""
    below = _number_below(scored.scores.masked_fill(protected, torch.inf))
    protected = protected | (scored.scores == torch.inf)
    if scored.chosen is not None:
        chosen = scored.chosen | protected
        below = _number_below(below + chosen * below.shape[-1])
    most = (below.masked_fill(protected, 0)).amax(-1, keepdim=True).clamp_min(1)
    return (below * 254 // most).masked_fill(protected, 255).to(torch.uint8)


def _number_below(x: Tensor) -> Tensor:
    """int64 [L, H, n], entries of the same head that are smaller."""
    return torch.searchsorted(x.sort(-1).values, x.contiguous())


def output_errors(view: CacheView, kept: Tensor) -> Tensor:
    """Relative change of the attention output of the last queries: float32 [L, H].

    ||o - o'|| / ||o|| in Frobenius norms over the observed queries and the query heads of a KV head. A query
    that is left without any token has the output 0.

    Args:
        view: the sequence, its queries observed.
        kept: bool [L, H, n].
    """
    queries = view.queries(OBSERVED_QUERIES)
    queries = queries.view(*view.lengths.shape, *queries.shape[1:])
    position, window = view.position, queries.shape[2]
    newest = position.amax() - torch.arange(window - 1, -1, -1, device=position.device)
    errors = []
    for layer in range(view.num_layers):
        keys, values = view.keys(layer), view.values(layer)
        hidden = position[layer][:, None] > newest[:, None]
        logits = softcapped(torch.einsum("hwgd,hnd->hwgn", queries[layer], keys) * view.scale, view.softcap)
        logits, stays = logits.masked_fill_(hidden[:, :, None], -torch.inf), kept[layer]
        if view.sinks:
            logits = with_sinks(logits, view.sinks[layer].view(len(keys), 1, -1))
            values, stays = pad(values, (0, 0, 0, 1)), pad(stays, (0, 1), value=True)
        logits = logits.flatten(1, 2)
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        whole = _output(weights, values)
        change = whole - _output(weights * stays[:, None], values)
        errors.append(change.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1).clamp_min(1e-30))
    return torch.stack(errors)


def _output(weights: Tensor, values: Tensor) -> Tensor:
    """Attention output [H, w, head_dim] of weights [H, w, n] that do not sum to 1 yet."""
    return weights @ values / weights.sum(-1, keepdim=True).clamp_min(1e-30)
