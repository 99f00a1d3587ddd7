"""A request's options resolved for its prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import numpy as np

from curkv.cache.budgets import Budget
from curkv.cache.layout import CacheLayout
from curkv.cache.observations import Needs
from curkv.cache.options import EvictionOptions, OptionError, SettledOptions, Span, merged_spans
from curkv.cache.parsing import check_options, settle
from curkv.cache.policies.base import Policy

DECODE_RECENT_TOKENS = 64
"""Newest tokens that an eviction during decode keeps (VaSE, https://arxiv.org/abs/2606.03928)."""


REPEATED_TOKENS = 2048
"""Tokens of a text that are repeated at once (KVzip, https://arxiv.org/abs/2505.23416, section 3.2)."""

INSTRUCTION_TOKENS = 64
"""Most tokens that ask for a repetition."""


@dataclass(frozen=True)
class EvictionPlan:
    """A request's options resolved for its prompt; nothing in it contradicts anything else.

    Attributes:
        options: The options with the preset and the policy's defaults filled in.
        prompt_tokens: Length of the prompt.
        context_tokens: First tokens of the prompt that are evicted from; the others are kept.
        budget_tokens: Tokens kept of these per head, on average, at the end of prefill.
        decode_budget_tokens: Tokens held per head above which an eviction is due during decode; None: never.
        sink_tokens: First tokens that are always kept.
        recent_tokens: Newest tokens kept at the end of prefill.
        decode_recent_tokens: Newest tokens kept by an eviction during decode.
        protect: Spans of the prompt that are always kept.
        seed: Of random numbers, at least 0.
        frame_tokens: First tokens of the prompt that a chat template wrote, whatever is said behind them.
        draft_tokens: Tokens of an answer that are drafted at the end of the prompt, to see what they look at.
        explained_behind: Most tokens that plans to be explained have computed behind the prompt.
    """

    options: SettledOptions
    prompt_tokens: int
    context_tokens: int
    budget_tokens: int
    decode_budget_tokens: int | None
    sink_tokens: int
    recent_tokens: int
    decode_recent_tokens: int
    protect: tuple[Span, ...]
    seed: int
    frame_tokens: int = 0
    draft_tokens: int = 0
    explained_behind: int = 0

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.options.policy

    @property
    def needs(self) -> Needs:
        """What has to be observed of the queries."""
        return self.options.needs

    @property
    def ragged(self) -> bool:
        """Whether heads may end with different numbers of tokens."""
        return self.policy.allocation.ragged

    @property
    def evicts_prompt(self) -> bool:
        """Whether anything is evicted in prefill."""
        return self.budget_tokens < self.context_tokens

    @property
    def observed(self) -> Needs:
        """What has to be observed if anything is evicted at all."""
        return self.needs if self.evicts_prompt or self.decode_budget_tokens is not None else Needs()

    @property
    def kept_prompt_tokens(self) -> int:
        """Prompt tokens held per head, on average, at the end of prefill."""
        return self.budget_tokens + self.prompt_tokens - self.context_tokens

    @property
    def peak_prompt_tokens(self) -> int:
        """Most prompt tokens held per head, on average, at any time."""
        context = self.context_tokens
        if self.chunk is not None:
            context = min(context, self.budget_tokens + self.chunk)
        return max(context + self.tokens_behind(self.context_tokens), self.kept_prompt_tokens)

    def tokens_behind(self, tokens: int) -> int:
        """Most tokens behind the context while so many of it are repeated, or an answer is drafted."""
        if self.observed.repetition:
            return min(tokens, REPEATED_TOKENS) + INSTRUCTION_TOKENS
        return max(self.draft_tokens, self.explained_behind)

    @property
    def computes_behind(self) -> bool:
        """Whether more than the prompt is computed before an eviction, and forgotten again."""
        return self.tokens_behind(self.context_tokens) > 0

    def peak_tokens_behind(self, tokens: int, held: float, evicted_at: int) -> int:
        """Most prompt tokens held per head, on average, if of the first `tokens` so many are held.

        Args:
            tokens: Of the prompt, computed before.
            held: Of these, per head, on average.
            evicted_at: How many there were when they were last evicted from.
        """
        left = self.prompt_tokens - tokens
        if self.chunk is not None and tokens < self.context_tokens:
            left = min(left, self.chunk + self.prompt_tokens - self.context_tokens)
            held = max(held, self.budget_tokens)
        return ceil(held) + left + self.tokens_behind(self.context_tokens - evicted_at)

    def protecting(self, spans: Iterable[Span]) -> EvictionPlan:
        """The same with further spans kept, if they leave room for the newest tokens."""
        protect = tuple(merged_spans([*self.protect, *spans]))
        covered = _covered([*protect, (0, self.sink_tokens)])
        decode, recent = self.decode_budget_tokens, self.decode_recent_tokens
        fits = covered + self.recent_tokens <= self.budget_tokens
        fits_decode = decode is None or covered + recent < decode
        return replace(self, protect=protect) if fits and fits_decode else self

    @property
    def chunk(self) -> int | None:
        """Tokens between two evictions of the prompt; None: there is at most one, when all is computed."""
        return self.options.prefill_chunk if self.evicts_prompt else None

    @property
    def streaming(self) -> bool:
        """Whether evictions come after every chunk of the prompt."""
        return self.chunk is not None

    @property
    def reusable(self) -> bool:
        """Whether its context, once compressed, can serve other requests with the same context and options.

        There has to be something after the context, from which the first token follows. Scores that are
        attention stand for the queries they were taken from and are not handed to others.
        """
        if not self.evicts_prompt or self.context_tokens == self.prompt_tokens or self.needs.attention_scores:
            return False
        return self.decode_budget_tokens is None or self.needs.query_agnostic

    def next_stop(self, computed: int) -> int:
        """Prompt position that a chunk must not cross, because the cache may be evicted there."""
        if computed >= self.context_tokens:
            return self.prompt_tokens
        if self.chunk is None:
            return self.context_tokens
        return min((computed // self.chunk + 1) * self.chunk, self.context_tokens)

    def prefill_due(self, computed: int, held_tokens: float) -> bool:
        """Whether to evict after a chunk of the prompt.

        Args:
            computed: Prompt tokens computed.
            held_tokens: Of these, per head, on average.
        """
        if not self.evicts_prompt or computed > self.context_tokens:
            return False
        due = computed == self.context_tokens or (self.chunk is not None and computed % self.chunk == 0)
        return due and held_tokens > self.budget_tokens

    def decode_due(self, generated_tokens: int, held_tokens: float) -> bool:
        """Whether to evict after a decode step.

        Args:
            generated_tokens: Stored since the prompt.
            held_tokens: Per head, on average.
        """
        budget, interval = self.decode_budget_tokens, self.options.decode_interval
        return budget is not None and generated_tokens % interval == 0 and held_tokens > budget


def resolve(
    options: EvictionOptions,
    prompt_tokens: Sequence[int],
    layout: CacheLayout,
    session: bool = False,
    frame_tokens: int = 0,
) -> EvictionPlan:
    """Resolve options for a prompt.

    Args:
        options: The request's options; of its bending budgets the plan has at least what the request and
            the policy keep in any case.
        prompt_tokens: Token ids of the prompt.
        layout: Shape of the cache.
        session: The conversation goes on from what is left of it: only what is new is repeated, as far as
            there is room.
        frame_tokens: First tokens of the prompt that a chat template wrote.

    Returns:
        The plan.

    Raises:
        OptionError: options contradict each other, or do not fit this prompt.
    """
    check_options(options)
    length = len(prompt_tokens)
    context = length if options.context_tokens is None else options.context_tokens
    repeats = session or context + min(context, REPEATED_TOKENS) + INSTRUCTION_TOKENS <= layout.max_tokens
    settled = settle(options, repeats, session)
    for field, end in (
        ("protect", settled.protect[-1][1] if settled.protect else 0),
        ("context_tokens", context),
    ):
        if end > length:
            raise OptionError(field, f"ends at token {end}, past the prompt, which has {length} tokens")
    if settled.policy.needs.repetition:
        if not repeats:
            message = f"repeats the context, and twice {context} tokens exceed {layout.max_tokens}"
            raise OptionError("policy", message, ("context_tokens",))
        # What follows gives the first token, when the repetition is done.
        context = min(context, max(1, length - 1))
    budget = _budget_tokens("budget", options, settled, context, layout)
    k = context if budget is None else min(budget, context)
    if "budget" in options.bending:
        window = options.own.get("observation", 0) and settled.policy.observing
        k = min(context, max(k, _covered(_asked_spans(settled, window, context))))
    settled = _fit_observation(options, settled, k)
    sinks, recent = _fit_prompt(settled, k, context)
    plan = EvictionPlan(
        options=settled,
        prompt_tokens=length,
        context_tokens=context,
        budget_tokens=k,
        decode_budget_tokens=_budget_tokens("decode_budget", options, settled, length, layout),
        sink_tokens=sinks,
        recent_tokens=recent,
        decode_recent_tokens=_decode_recent(settled),
        protect=settled.protect,
        seed=content_seed(prompt_tokens[:context]) if settled.seed is None else settled.seed % (1 << 64),
        frame_tokens=frame_tokens,
    )
    if plan.evicts_prompt and context == length:
        plan = replace(plan, draft_tokens=min(plan.policy.drafts(k), max(0, layout.max_tokens - length)))
    return _fit_decode(plan, bends="decode_budget" in options.bending)


def content_seed(prompt_tokens: Sequence[int]) -> int:
    """Derive a seed from token ids, 0 to 2^63 - 1; the same on every machine."""
    digest = hashlib.blake2b(np.asarray(prompt_tokens, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _budget_tokens(
    field: Literal["budget", "decode_budget"],
    asked: EvictionOptions,
    options: SettledOptions,
    length: int,
    layout: CacheLayout,
) -> int | None:
    budget: Budget | None = getattr(options, field)
    if budget is None:
        return None
    slack = options.decode_interval if field == "decode_budget" else 0
    tokens = budget.tokens(length, layout, ragged=options.policy.allocation.ragged, slack=slack)
    if tokens < 1 and field in asked.bending:
        return 1
    if tokens < 1:
        message = f"{budget} is too little for the pages of {layout.num_heads} heads in all layers"
        raise OptionError(field, message)
    return tokens


def _fit_observation(asked: EvictionOptions, settled: SettledOptions, k: int) -> SettledOptions:
    """A window that was not asked for takes at most a quarter of the budget; one that was has to fit."""
    window = settled.policy.observing
    if window and "observation" not in asked.own:
        narrow = {"observation": max(1, min(window, k // 4))}
        return settle(replace(asked, policy=settled.policy.name, own={**asked.own, **narrow}))
    if window > k:
        message = (
            f"the newest {window} tokens judge the others and are kept, but the budget keeps {k} per head"
        )
        raise OptionError("observation", message, ("budget",))
    return settled


def _fit_prompt(options: SettledOptions, k: int, length: int) -> tuple[int, int]:
    """First and newest tokens that an eviction of the prompt to k tokens per head keeps.

    What the request asks for must fit; what the policy and the preset ask for takes the room that is left.
    """
    preset, sinks, recent = options.preset, options.sink_tokens, options.recent_tokens
    published, window = options.policy.published, min(options.policy.observing, length)
    newest = max(recent or 0, window)
    room = k - _covered(_asked_spans(options, window, length))
    if room < 0:
        names = [name for name in ("sink_tokens", "recent_tokens", "protect") if getattr(options, name)]
        names += ["observation"] if window and newest == window else []
        message = f"{' + '.join(names)} protect {k - room} tokens, but the budget keeps {k} per head"
        raise OptionError("budget", message, tuple(names))
    if sinks is None:
        sinks = min(max(published.sinks, preset.sink_tokens or 0), room)
        room -= sinks
    if recent is None:
        as_published = preset.sink_tokens is None or window
        recent = published.recent if as_published else preset.recent_tokens
        recent = max(min(recent, k // 4), int(published.recent_share * k))
        recent = min(recent, newest + room)
    return sinks, max(recent, window)


def _asked_spans(options: SettledOptions, window: int, length: int) -> list[Span]:
    """What a request asks to keep of the first `length` tokens of its prompt, besides the window."""
    newest = max(options.recent_tokens or 0, window)
    spans = [(start, min(end, length)) for start, end in options.protect if start < length]
    return [*spans, (0, min(options.sink_tokens or 0, length)), (max(0, length - newest), length)]


def _decode_recent(options: SettledOptions) -> int:
    window = options.policy.observing
    if options.recent_tokens is not None:
        return max(options.recent_tokens, window)
    return window or DECODE_RECENT_TOKENS


def _fit_decode(plan: EvictionPlan, bends: bool) -> EvictionPlan:
    """Hold more than what is always kept while generating; a budget that does not is refused, or bends."""
    budget, recent = plan.decode_budget_tokens, plan.decode_recent_tokens
    protected = _covered([*plan.protect, (0, plan.sink_tokens)]) + recent
    if budget is None or budget > protected:
        return plan
    if bends:
        return replace(plan, decode_budget_tokens=protected + 1)
    names = ("sink_tokens", "recent_tokens", *(("protect",) if plan.protect else ()))
    message = (
        f"keeps {budget} tokens per head, not more than the {protected} that are always kept while "
        f"generating: the newest {recent} and {protected - recent} others ({', '.join(names)})"
    )
    raise OptionError("decode_budget", message, names)


def _covered(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in merged_spans(spans))
