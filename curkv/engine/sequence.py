"""One choice of one request, from arrival to its last token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from curkv.cache.explain import NEEDS, Explanation
from curkv.cache.observations import Needs
from curkv.cache.plan import EvictionPlan
from curkv.cache.prefixes import Prefix
from curkv.cache.reuse import ReuseKeys
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.repetition import Repetition
from curkv.engine.types import Request, TokenLogprob

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from torch import Tensor

    from curkv.cache.stored import Restored


@dataclass
class Progress:
    """How far a sequence is computed, and what became of it on the way: what computing it again finds again.

    Attributes:
        computed: logical tokens whose K and V went through the cache, kept or not.
        kept_tokens: prompt tokens held per head, on average, at the end of prefill; None before.
        evicted_tokens: tokens evicted so far, per head on average.
        evictions: rounds of eviction so far.
        evicted_at: tokens computed at the last of them.
        shareable: what it holds is what any sequence of its tokens would, as far as nothing was evicted.
        decode_evictions: of these, while generating.
        prompt_logprobs: of its prompt, as far as it is computed.
        explanations: of the plans explained so far.
        states: sum of the last hidden states of its computed tokens, [hidden], if its request asks for it.
        repetition: of what is computed, if the policy has the model repeat it.
        repeated_tokens: tokens computed for that, instructions included, or for a draft.
        following: the likeliest token behind the prompt, int64 [1], if an answer is to be drafted.
        repeated: what that has paid to the tokens kept at the last eviction, see `Prefix`.
    """

    computed: int = 0
    kept_tokens: float | None = None
    evicted_tokens: float = 0.0
    evictions: int = 0
    evicted_at: int = 0
    shareable: bool = True
    decode_evictions: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    states: Tensor | None = None
    repetition: Repetition | None = None
    repeated_tokens: int = 0
    repeated: Tensor | None = None
    following: Tensor | None = None

    @classmethod
    def behind(cls, prefix: Prefix | None) -> Progress:
        """That of a sequence that starts where a prefix ends, or at the beginning."""
        if prefix is None:
            return cls()
        evicted = prefix.tokens - float(prefix.lengths.mean())
        return cls(
            computed=prefix.tokens,
            evicted_tokens=evicted,
            evictions=prefix.evictions,
            evicted_at=prefix.evicted_at,
            shareable=prefix.shareable,
            repeated=prefix.repeated,
        )

    def copy(self) -> Progress:
        """The same, to go on apart; what was computed for both is told by one."""
        prompt_logprobs, explanations = list(self.prompt_logprobs), list(self.explanations)
        return replace(self, prompt_logprobs=prompt_logprobs, explanations=explanations, repeated_tokens=0)


@dataclass(frozen=True)
class FirstRun:
    """When a sequence first ran, `time.monotonic()` in seconds, and with how many tokens of a prefix."""

    time: float
    cached_tokens: int


@dataclass(eq=False)
class Sequence:
    """A sequence of tokens and where its KV cache stands.

    A preempted sequence loses its progress and is fed its own tokens again, evictions at the same places
    included.

    Attributes:
        request: what was asked.
        index: which of the request's `n` choices this is.
        order: rank of arrival; a preempted sequence keeps it.
        plan: the request's eviction options, resolved for its prompt.
        seed: seed of this choice's random stream.
        max_tokens: most tokens that it generates.
        detokenizer: turns its tokens into text and watches for stop strings.
        matcher: follows the structure of its output, if it has one.
        explain_plans: plans to be explained after the prompt.
        keys: under which prefixes of its prompt are cached.
        read: what was read from disk for it and is not in memory yet.
        slot: row of the page table, -1 while the sequence holds no memory.
        output: generated tokens.
        token_times: when each of them was sampled, `time.monotonic()`.
        forks: further choices that will share its prompt.
        progress: how far it is computed.
        first_run: when it first ran; None: it did not yet.
        peak_bytes: most bytes of pages held at the end of any step.
        chunk_states: sum of the last hidden states of the chunk that was computed last, [hidden].
        faulty: something raised while it was worked on, and it was computed anew: it has no second chance.
        evicted_alone: an eviction of several sequences raised: from now on it is evicted by itself.
    """

    request: Request
    index: int
    order: int
    plan: EvictionPlan
    seed: int
    max_tokens: int
    detokenizer: Detokenizer
    matcher: LLMatcher | None = None
    explain_plans: tuple[EvictionPlan, ...] = ()
    keys: ReuseKeys = field(default_factory=ReuseKeys)
    read: tuple[Restored, ...] = ()
    slot: int = -1
    output: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    first_run: FirstRun | None = None
    peak_bytes: int = 0
    chunk_states: Tensor | None = None
    faulty: bool = False
    evicted_alone: bool = False

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.request.prompt_token_ids

    @property
    def priority(self) -> tuple[int, int]:
        """Lower runs first and is preempted last."""
        return (self.request.priority, self.order)

    @property
    def computed(self) -> int:
        """Tokens computed so far."""
        return self.progress.computed

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed: one in a decode step, none while the prompt is being explained."""
        return self.num_tokens - self.progress.computed

    @property
    def prefilling(self) -> bool:
        """Whether the prompt is not fully computed."""
        return self.progress.computed < len(self.prompt)

    @property
    def repeating(self) -> bool:
        """Whether the model repeats its text, and nothing of it goes on meanwhile."""
        repetition = self.progress.repetition
        return repetition is not None and not repetition.done

    @property
    def compressing(self) -> bool:
        """Whether the context that is cached compressed is still to be."""
        return self.computed < self.keys.context_tokens or self.repeating

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that it took from a prefix when it first ran."""
        return self.first_run.cached_tokens if self.first_run is not None else 0

    @property
    def observed(self) -> Needs:
        """What has to be observed of its queries."""
        return observed_of(self.plan, self.explain_plans)

    @property
    def observes_answer(self) -> bool:
        """Whether queries of generated tokens are observed too, for them or for the session's next turn."""
        if self.plan.decode_budget_tokens is not None or self.explain_plans:
            return True
        return self.keys.session is not None and self.observed.all_queries

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be reported."""
        return self.request.sampling.prompt_logprobs is not None and not self.output

    @property
    def computes_all(self) -> bool:
        """Whether no token of its prompt may be taken from what is cached."""
        return self.wants_prompt_logprobs or self.request.sampling.embed

    def drafts_behind(self, chunk: int) -> bool:
        """Whether so many tokens more end the prompt, and an answer to it is to be drafted."""
        plans = self.plan, *self.explain_plans
        return self.computed + chunk == len(self.prompt) and any(plan.draft_tokens for plan in plans)

    def next_stop(self) -> int:
        """Logical position that the next chunk must not cross.

        The cache may be evicted there; and generated tokens go one by one even if they are known, because the
        sequence was preempted: as a chunk of several they would be computed as a prompt is, which rounds
        differently.
        """
        if self.repeating:
            return self.computed
        return self.plan.next_stop(self.computed) if self.prefilling else self.computed + 1

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at logical positions start .. start + count."""
        prompt = self.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : start - len(prompt) + count]
        head = prompt[start : start + count]
        return head + self.output[: count - len(head)]

    def start(self, slot: int, prefix: Prefix | None) -> None:
        """Lets it run from where a prefix ends, or from the beginning; what that protects stays protected."""
        self.slot, self.progress = slot, Progress.behind(prefix)
        if prefix is not None and prefix.protect:
            self.plan = self.plan.protecting(prefix.protect)
        if self.first_run is None:
            self.first_run = FirstRun(time.monotonic(), self.computed)

    def fork_from(self, parent: Sequence, slot: int) -> None:
        """Lets it go on from where another choice of its request stands."""
        self.slot, self.progress, self.first_run = slot, parent.progress.copy(), parent.first_run

    def reset(self) -> None:
        """Forgets everything that computing it again will find again."""
        self.slot, self.progress = -1, Progress()


def observed_of(plan: EvictionPlan, explain_plans: tuple[EvictionPlan, ...]) -> Needs:
    """What has to be observed of a sequence's queries for its plan and for those to be explained."""
    needs = [NEEDS, *(other.needs for other in explain_plans)] if explain_plans else []
    return reduce(or_, needs, plan.observed)
