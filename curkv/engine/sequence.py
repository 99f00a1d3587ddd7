"""One choice of one request, from arrival to its last token."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from curkv.cache.explain import NEEDS, Explanation
from curkv.cache.observations import Needs
from curkv.cache.plan import EvictionPlan
from curkv.cache.prefixes import Prefix
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.types import KVReport, Request, TokenLogprob

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(eq=False)
class Sequence:
    """A sequence of tokens and where its KV cache stands.

    `computed` counts logical tokens whose K and V went through the cache, kept or not; a preempted sequence
    falls back to 0 and is fed its own tokens again, evictions at the same places included.

    Attributes:
        request: what was asked.
        index: which of the request's `n` choices this is.
        order: rank of arrival; a preempted sequence keeps it.
        plan: the request's eviction options, resolved for its prompt.
        seed: seed of this choice's random stream.
        detokenizer: turns its tokens into text and watches for stop strings.
        matcher: follows the structure of its output, if it has one.
        candidates: plans to be explained after the prompt.
        block_keys: under which the blocks of its prompt are held, see `curkv.cache.prefixes`.
        context_key: under which its compressed context is held; None if it is not to be.
        cached_tokens: prompt tokens that it took from a prefix when it first ran.
        slot: row of the page table, -1 while the sequence holds no memory.
    """

    request: Request
    index: int
    order: int
    plan: EvictionPlan
    seed: int
    detokenizer: Detokenizer
    matcher: LLMatcher | None = None
    candidates: tuple[EvictionPlan, ...] = ()
    block_keys: list[bytes] = field(default_factory=list)
    context_key: Hashable | None = None
    cached_tokens: int = 0
    output: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    forks: list[Sequence] = field(default_factory=list)

    first_scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)
    kept_tokens: float | None = None
    evicted_tokens: float = 0.0
    evictions: int = 0
    decode_evictions: int = 0
    peak_bytes: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.request.prompt_token_ids

    @property
    def priority(self) -> tuple[int, int]:
        """Lower runs first and is preempted last."""
        return (self.request.priority, self.order)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed: one in a decode step, none while the prompt is being explained."""
        return self.num_tokens - self.computed

    @property
    def prefilling(self) -> bool:
        """Whether the prompt is not fully computed."""
        return self.computed < len(self.prompt)

    @property
    def observed(self) -> Needs:
        """What has to be observed of its queries."""
        needs = [NEEDS, *(plan.needs for plan in self.candidates)] if self.candidates else []
        return reduce(or_, needs, self.plan.observed)

    @property
    def lent_tokens(self) -> int:
        """First tokens of the prompt whose K and V can be held for others: all before the first eviction.

        Where attention is summed up, pages are written to as long as their sequence runs; and a context that
        is held compressed is not held as a whole too.
        """
        if self.observed.column_sums or self.context_key is not None:
            return 0
        return self.plan.next_stop(0)

    @property
    def borrowed_tokens(self) -> int:
        """First tokens of the prompt whose K and V can be those of others.

        What is left must hold the queries that the policy observes, and two tokens: a single one would be
        computed as a decode, which rounds differently.
        """
        if self.observed.all_queries or self.wants_prompt_logprobs:
            return 0
        return max(0, self.plan.next_stop(0) - max(2, self.observed.queries))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be reported."""
        return self.request.sampling.prompt_logprobs is not None and not self.output

    @property
    def reported_prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of its prompt, if they were asked for."""
        return self.prompt_logprobs if self.request.sampling.prompt_logprobs is not None else None

    def next_stop(self) -> int:
        """Logical position that the next chunk must not cross.

        The cache may be evicted there; and generated tokens go one by one even if they are known, because the
        sequence was preempted: as a chunk of several they would be computed as a prompt is, which rounds
        differently.
        """
        return self.plan.next_stop(self.computed) if self.prefilling else self.computed + 1

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at logical positions start .. start + count."""
        prompt = self.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : start - len(prompt) + count]
        head = prompt[start : start + count]
        return head + self.output[: count - len(head)]

    def reset(self) -> None:
        """Forgets everything that recomputing will find again."""
        self.slot, self.computed = -1, 0
        self.kept_tokens, self.evicted_tokens = None, 0.0
        self.evictions = self.decode_evictions = 0
        self.prompt_logprobs, self.explanations = [], []

    def report(self, held_bytes: int) -> KVReport | None:
        """What eviction did; None before the end of prefill."""
        if self.kept_tokens is None:
            return None
        return KVReport(
            policy=self.plan.policy.name,
            budget_tokens=self.plan.kept_prompt_tokens,
            kept_tokens=round(self.kept_tokens, 3),
            evicted_tokens=round(self.evicted_tokens, 3),
            kept_ratio=round(self.kept_tokens / len(self.prompt), 6),
            bytes=held_bytes,
            peak_bytes=max(self.peak_bytes, held_bytes),
            decode_evictions=self.decode_evictions,
        )

    def start(self, slot: int, prefix: Prefix | None) -> None:
        """Lets it run from where a prefix ends, or from the beginning."""
        self.slot = slot
        if prefix is not None:
            self.computed, self.evictions = prefix.tokens, prefix.evictions
            self.evicted_tokens = prefix.tokens - float(prefix.lengths.mean())
        if self.first_scheduled is None:
            self.first_scheduled = time.monotonic()
            self.cached_tokens = self.computed
