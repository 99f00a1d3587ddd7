"""What the server asks of the engine and what it gets back: plain data."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from curkv.cache.reuse import ReuseKeys

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from curkv.cache.explain import Explanation
    from curkv.cache.options import EvictionOptions
    from curkv.cache.plan import EvictionPlan
    from curkv.cache.stored import Restored

FinishReason = Literal["stop", "length", "abort", "error"]


class InvalidRequest(ValueError):
    """A request that can never be served as asked; the server answers 400.

    Attributes:
        param: name of the field at fault (`prompt`, `max_tokens`, `kv.budget`), None if no single field is.
        message: what is wrong and what would be right, for the caller.
        code: for a program, where OpenAI's API has one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def of(self, param: str | None) -> InvalidRequest:
        """The same, of another field."""
        return InvalidRequest(self.message, param, self.code)


CONTEXT_EXCEEDED = "context_length_exceeded"
"""Code of prompts that are too long, as OpenAI's API gives it; clients shorten their prompts by it."""


Phase = Literal[
    "add",
    "explain",
    "schedule",
    "start",
    "forward",
    "prompt_logprobs",
    "prefix",
    "evict",
    "trim",
    "fork",
    "sample",
    "detokenize",
    "report",
    "free",
]
"""What the engine does with a sequence: once it comes, and then step by step."""


class EngineFault(Exception):
    """The engine could not go on with a sequence; the cause of this error is what was raised.

    Attributes:
        phase: what was being done.
    """

    def __init__(self, phase: Phase):
        super().__init__(f"the engine failed on this request (phase: {phase}); the server's log says more")
        self.phase = phase


def check_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    """Checks that token ids are of a vocabulary.

    Raises:
        InvalidRequest: one is not; the error names it and `param`.
    """
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"token id {bad} is outside the vocabulary 0..{vocab_size - 1}", param)


@dataclass(frozen=True)
class Structure:
    """A form that the output has to have.

    Attributes:
        kind: "json" for a JSON schema, "regex" for an expression that the whole output matches, "choice" for
            one of several texts, "grammar" for Lark, EBNF or GBNF, "lark" for Lark as llguidance reads it.
        source: the schema, the expression, the texts or the grammar.
        param: the request's field that asked for it.
        ignored: what of it is not followed.
    """

    kind: Literal["json", "regex", "choice", "grammar", "lark"]
    source: Any
    param: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    Attributes:
        max_tokens: most tokens to generate; 0 ends after the prompt, None means as many as the context holds.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: 0 keeps all tokens.
        min_p: least probability relative to the likeliest token, in [0, 1].
        seed: seed of this request's random stream; None draws one.
        n: independent choices for the prompt.
        stop: strings that end generation; not part of the text returned.
        stop_token_ids: token ids that end generation.
        ignore_eos: go on past the model's end-of-sequence token.
        min_tokens: tokens generated before end-of-sequence or a stop token may be chosen.
        presence_penalty: subtracted once from each token already generated, in [-2, 2].
        frequency_penalty: subtracted per occurrence among the generated tokens, in [-2, 2].
        repetition_penalty: divides (multiplies, if negative) logits of tokens seen in prompt or output; > 0.
        logit_bias: added to the logits of token ids, in [-100, 100].
        logprobs: alternatives reported per generated token; 0 reports the chosen one alone, None nothing.
        prompt_logprobs: the same of the prompt's tokens, from the second one on.
        structure: form of the output, if it is not free.
        skip_special_tokens: special tokens have no text in the answer.
        include_stop: the stop string or token that ended generation is part of the text returned.
        allowed_token_ids: the only ids that may be chosen; None: all.
        bad_words: sequences of token ids of which no output has one.
        embed: report the mean of the last hidden states of the prompt's tokens.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    embed: bool = False

    @property
    def reads_all(self) -> bool:
        """Whether something is to be told of every token of the prompt: none may come from a cache."""
        return self.prompt_logprobs is not None or self.embed


@dataclass(frozen=True)
class Request:
    """One prompt to be continued `sampling.n` times.

    Attributes:
        id: unique among running requests.
        prompt_token_ids: at least one id of the model's vocabulary.
        sampling: sampling parameters.
        eviction: what the request's KV cache may keep.
        explain: options to be asked, after the prompt, what they would keep of it; nothing is generated then.
        cache_salt: prompts share prefixes only with those of the same salt.
        priority: lower runs first; equal priorities run in order of arrival.
        owner: name of the API key that it came with.
        traceparent: the span that it belongs to, as in W3C Trace Context; "" if none.
        tenant: who alone finds what is cached of it; "": everybody with the same salt.
        context_ttl: seconds for which what is cached of its context gives way after all else.
        session: the conversation of that key that it goes on; "": none.
        frame_tokens: first tokens of the prompt that a chat template wrote, whatever is said behind them.
        arrival_time: `time.monotonic()` in seconds.
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eviction: EvictionOptions
    explain: tuple[EvictionOptions, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    owner: str = ""
    traceparent: str = ""
    tenant: str = ""
    context_ttl: float = 0.0
    session: str = ""
    frame_tokens: int = 0
    arrival_time: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Planned:
    """A request that was found servable, and what was worked out on the way.

    Attributes:
        request: the request.
        eviction: its eviction options, resolved for its prompt.
        max_tokens: most tokens that each choice generates.
        explain_plans: the options to be explained, resolved to plans.
        matcher: stands at the start of an output that follows its structure; None: the output is free.
        keys: under what its prefixes are cached.
        read: what was read from disk for it.
    """

    request: Request
    eviction: EvictionPlan
    max_tokens: int
    explain_plans: tuple[EvictionPlan, ...] = ()
    matcher: LLMatcher | None = None
    keys: ReuseKeys = field(default_factory=ReuseKeys)
    read: tuple[Restored, ...] = ()


@dataclass(frozen=True)
class KVReport:
    """What eviction really did to one choice.

    Attributes:
        policy: name of the policy.
        budget_tokens: tokens per head, on average, that the prompt was allowed to keep.
        kept_tokens: prompt tokens kept at the end of prefill, mean over layers and heads.
        evicted_tokens: tokens evicted in prefill and decode, mean over layers and heads.
        kept_ratio: kept / prompt tokens at the end of prefill, mean over layers and heads.
        bytes: pages held when the choice ended, in bytes.
        peak_bytes: most bytes of pages held at any time.
        decode_evictions: rounds of eviction while generating.
        repeated_tokens: computed besides the prompt, for a policy that has it repeated or an answer drafted.
        window_layers: layers that hold what their window reaches, and are not counted above but in bytes.
    """

    policy: str
    budget_tokens: int
    kept_tokens: float
    evicted_tokens: float
    kept_ratio: float
    bytes: int
    peak_bytes: int
    decode_evictions: int
    repeated_tokens: int = 0
    window_layers: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and of the likeliest ones at its place.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: (token id, log-probability) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """News of one choice of a request.

    Attributes:
        request_id: the request.
        index: the choice, 0 to n - 1.
        text: text added since the choice's previous output.
        token_ids: tokens added since.
        logprobs: one entry per token of `token_ids` if asked for.
        prompt_logprobs: on the choice's first output, if asked for: one entry per prompt token but the first.
        explanations: on the last output, one of each option in `explain`.
        embedding: on the last output, if asked for: the mean of the prompt's last hidden states, [hidden].
        finish_reason: None while the choice runs.
        stop_reason: the stop string or token id that ended the choice, if one did.
        problem: what made the choice end in an error: of the request, or of the engine.
        kv: eviction report, on the choice's last output.
        cached_tokens: prompt tokens that were not computed, for they were cached from an earlier prompt.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    explanations: list[Explanation] = field(default_factory=list)
    embedding: list[float] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    problem: InvalidRequest | EngineFault | None = None
    kv: KVReport | None = None
    cached_tokens: int = 0
