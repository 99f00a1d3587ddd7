"""A request's eviction options: read, checked against each other, and resolved for one prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curkv.cache.budgets import Budget, parse_budget
from curkv.cache.policies import KVPRESS_PREFIX, UnknownPolicy, get_policy
from curkv.cache.policies.base import Allocation, Needs, Policy

if TYPE_CHECKING:
    from curkv.cache.kv_cache import CacheLayout

Span = tuple[int, int]
Leverage = Literal["window", "norm", "sketch", "exact"]

DECODE_RECENT_TOKENS = 64
"""Newest tokens that an eviction during decode keeps (VaSE, https://arxiv.org/abs/2606.03928)."""


class OptionError(ValueError):
    """An option is wrong, or contradicts others.

    Attributes:
        field: The option.
        message: What is wrong with it, naming the options it contradicts.
        others: The options it contradicts.
    """

    def __init__(self, field: str, message: str, others: tuple[str, ...] = ()) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.others = others


@dataclass(frozen=True)
class Preset:
    """Published or recommended settings.

    Attributes:
        leverage: CurDKV's "window" or "sketch".
        partial_window: How "window" treats the last, partial window; see `leverage_scores`.
        sink_tokens: First tokens kept; None: as the policy was published.
        recent_tokens: Newest tokens kept, or a quarter of the budget if that is less.
    """

    leverage: Leverage
    partial_window: Literal["corrected", "left", "right"]
    sink_tokens: int | None
    recent_tokens: int


PRESETS = {
    # Without a recent window a policy that reads no queries loses the thread of the text.
    "serving": Preset("window", "corrected", sink_tokens=4, recent_tokens=64),
    "paper": Preset("sketch", "corrected", sink_tokens=None, recent_tokens=0),
    "authors": Preset("window", "left", sink_tokens=None, recent_tokens=0),
    "kvpress": Preset("window", "right", sink_tokens=None, recent_tokens=0),
}


@dataclass(frozen=True)
class EvictionOptions:
    """What a request asks of its cache. None means what the preset says.

    Attributes:
        policy: One of `policy_names()`.
        budget: What may be kept of the prompt; None keeps all of it.
        decode_budget: What may be held while generating; None: generated tokens are not evicted.
        preset: One of `PRESETS`.
        sink_tokens: First tokens of the prompt that are always kept, 4 in StreamingLLM and CurDKV.
        recent_tokens: Newest tokens that are always kept.
        protect: Spans (start, end) of the prompt that are always kept, end exclusive; disjoint and ascending.
        seed: Of random numbers; None derives it from the prompt, so that a repeat is a repeat.
        leverage: CurDKV's energies: "window" (shares of ||k||^2 in windows), "norm" (shares of the whole
            head), "sketch" (random projection) or "exact" (statistical leverage).
        rank: Columns of the sketch, 20 in the paper (section 3).
        window: Tokens of a window, 16 in the authors' code.
        combine: How CurDKV combines the terms of key and value.
        pool: Odd kernel size of a 1-D pooling of the scores over a head's stored tokens; 1 is off.
        pool_kind: What the pooling takes of its neighbourhood.
        allocation: How heads and layers share the budget: "uniform", "adaptive" (heads of a layer compete;
            Ada-KV) or "pyramid" (lower layers get more; PyramidKV).
        alpha: Share of the kept tokens that each head is sure of under adaptive allocation, 0.2 in Ada-KV.
        beta: Steepness of the pyramid: its last layer gets 1 / beta of the mean, 20 in PyramidKV.
        observation: Newest tokens whose queries judge the others, 32 in SnapKV.
        reduction: What counts of the observed queries' attention, the "mean" or the "max"imum over them.
        times: A second policy whose scores are multiplied with those of the first.
        times_pool: Pooling of the second policy's scores.
        scorer: Whose scores ChunkKV takes.
        chunk: Tokens that ChunkKV keeps or drops together, and over which SnapCUR finds passages.
        first_stage: Share of the budget that CriticalKV gives to attention alone, and SnapCUR to passages.
        future: Positions after the prompt that Expected Attention averages over.
        blend: Weight of leverage beside attention in Compactor.
        block: Tokens of a block of Compactor's attention.
        ladder: Tokens over which LaCache's pattern repeats.
        decode_interval: Generated tokens between two evictions, 64 in VaSE.
        merge: What becomes of evicted tokens: "none", or "nearest": merged into the most similar kept key.
        merge_threshold: Least cosine of two keys that are merged.
        context_tokens: First tokens of the prompt that are compressed before the rest is computed; the rest
            is kept. None: the whole prompt.
        prefill: "exact" evicts once, when all is computed; "streaming" to the budget after every chunk.
        prefill_chunk: Tokens of such a chunk.
    """

    policy: str = "full"
    budget: Budget | None = None
    decode_budget: Budget | None = None
    preset: str = "serving"
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    protect: tuple[Span, ...] = ()
    seed: int | None = None
    leverage: Leverage | None = None
    rank: int = 20
    window: int = 16
    combine: Literal["product", "mean", "key", "value"] | None = None
    pool: int | None = None
    pool_kind: Literal["max", "mean"] | None = None
    allocation: Allocation | None = None
    alpha: float = 0.2
    beta: float = 20.0
    observation: int | None = None
    reduction: Literal["mean", "max"] | None = None
    times: str | None = None
    times_pool: int | None = None
    scorer: Literal["snapkv", "curdkv"] = "snapkv"
    chunk: int | None = None
    first_stage: float = 0.5
    future: int = 512
    blend: float = 0.5
    block: int = 256
    ladder: int = 256
    decode_interval: int | None = None
    merge: Literal["none", "nearest"] = "none"
    merge_threshold: float = 0.6
    context_tokens: int | None = None
    prefill: Literal["exact", "streaming"] = "exact"
    prefill_chunk: int = 512

    @property
    def partial_window(self) -> Literal["corrected", "left", "right"]:
        """How the preset treats a partial window."""
        return PRESETS[self.preset].partial_window


@dataclass(frozen=True)
class EvictionPlan:
    """A request's options resolved for its prompt; nothing in it contradicts anything else.

    Attributes:
        policy: The policy.
        options: The options with the preset and the policy's defaults filled in.
        needs: What has to be observed of the queries.
        prompt_tokens: Length of the prompt.
        context_tokens: First tokens of the prompt that are evicted from; the others are kept.
        budget_tokens: Tokens kept of these per head, on average, at the end of prefill.
        decode_budget_tokens: Tokens held per head above which an eviction is due during decode; None: never.
        sink_tokens: First tokens that are always kept.
        recent_tokens: Newest tokens kept at the end of prefill.
        decode_recent_tokens: Newest tokens kept by an eviction during decode.
        protect: Spans of the prompt that are always kept.
        seed: Of random numbers, at least 0.
    """

    policy: Policy
    options: EvictionOptions
    needs: Needs
    prompt_tokens: int
    context_tokens: int
    budget_tokens: int
    decode_budget_tokens: int | None
    sink_tokens: int
    recent_tokens: int
    decode_recent_tokens: int
    protect: tuple[Span, ...]
    seed: int

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
        if self.streaming:
            context = min(context, self.budget_tokens + self.options.prefill_chunk)
        return max(context, self.kept_prompt_tokens)

    @property
    def streaming(self) -> bool:
        """Whether evictions come after every chunk of the prompt."""
        return self.options.prefill == "streaming" and self.evicts_prompt

    def next_stop(self, computed: int) -> int:
        """Prompt position that a chunk must not cross, because the cache may be evicted there."""
        if computed >= self.context_tokens:
            return self.prompt_tokens
        chunk = self.options.prefill_chunk
        stop = (computed // chunk + 1) * chunk if self.streaming else self.context_tokens
        return min(stop, self.context_tokens)

    def prefill_due(self, computed: int, held_tokens: float) -> bool:
        """Whether to evict after a chunk of the prompt.

        Args:
            computed: Prompt tokens computed.
            held_tokens: Of these, per head, on average.
        """
        if not self.evicts_prompt or computed > self.context_tokens:
            return False
        due = computed == self.context_tokens
        if self.streaming:
            due = due or computed % self.options.prefill_chunk == 0
        return due and held_tokens > self.budget_tokens

    def decode_due(self, generated_tokens: int, held_tokens: float) -> bool:
        """Whether to evict after a decode step.

        Args:
            generated_tokens: Stored since the prompt.
            held_tokens: Per head, on average.
        """
        budget = self.decode_budget_tokens
        interval = self.options.decode_interval or 1
        return budget is not None and generated_tokens % interval == 0 and held_tokens > budget


def parse_options(raw: Mapping[str, object], defaults: EvictionOptions | None = None) -> EvictionOptions:
    """Read options from headers or a JSON object.

    Args:
        raw: Value of each field that was given: a string, or what JSON has for it. A None counts as not
            given.
        defaults: Of fields that were not given; those that the given ones leave without effect, such as a
            budget with policy "full", are left out.

    Returns:
        The options; they agree with each other as far as can be told without the prompt.

    Raises:
        OptionError: a value is wrong, a field unknown, or two fields contradict each other.
    """
    given: dict[str, Any] = {}
    for field, value in raw.items():
        if field not in _PARSERS:
            near = " or ".join(get_close_matches(field, _PARSERS, n=2))
            raise OptionError(field, f"unknown option{f', perhaps {near}' if near else ''}; see docs/api.md")
        if value is not None:
            try:
                given[field] = _PARSERS[field](value)
            except ValueError as error:
                raise OptionError(field, str(error)) from None
    defaults = defaults or EvictionOptions()
    if given.get("policy") == "full" != defaults.policy:
        defaults = EvictionOptions()
    options = replace(defaults, **given)
    unread: dict[str, Any] = {
        field: _DEFAULTS[field] for field in _without_effect(options) if field not in given
    }
    options = replace(options, **unread)
    check_options(options)
    return options


def check_options(options: EvictionOptions) -> None:
    """Refuse options that contradict each other whatever the prompt.

    Raises:
        OptionError: naming both.
    """
    budgets = [field for field in ("budget", "decode_budget") if getattr(options, field) is not None]
    if options.policy == "full" and budgets:
        message = f"policy 'full' keeps everything; choose a policy that evicts, or leave {budgets[0]} out"
        raise OptionError(budgets[0], message, ("policy",))
    if options.policy != "full" and not budgets:
        message = f"policy {options.policy!r} needs a budget or decode_budget to evict to; 'full' needs none"
        raise OptionError("budget", message, ("policy",))
    settled = settle(options)
    for field, other in _without_effect(options).items():
        if getattr(options, field) != _DEFAULTS[field]:
            value = getattr(settled, other)
            shown = str(value) if isinstance(value, Budget) else repr(value)
            raise OptionError(field, f"has no effect with {other} {shown}", (other,))
    _check_combination(settled)


def _check_combination(options: EvictionOptions) -> None:
    """Refuse settled options of which each is fine alone."""
    policy, allocation = get_policy(options.policy), options.allocation
    if allocation not in policy.allocations:
        message = f"policy {policy.name!r} scores all heads alike; {allocation!r} cannot tell them apart"
        raise OptionError("allocation", message, ("policy",))
    for first, second in ((policy, options.times), (get_policy(options.times or "curdkv"), options.policy)):
        if options.times is not None and not first.factor:
            message = (
                f"scores of policy {first.name!r} are no shares and cannot be multiplied with {second!r}'s"
            )
            raise OptionError("times", message, ("policy",))


def settle(options: EvictionOptions) -> EvictionOptions:
    """Fill in what the preset, the policy and the server's recommendations say where the request does not."""
    policy, preset = get_policy(options.policy), PRESETS[options.preset]
    options = options if options.times else replace(options, times=policy.defaults.get("times"))
    values: dict[str, Any] = {
        "allocation": policy.allocation,
        "leverage": preset.leverage,
        "combine": "product",
        "pool": 1,
        "pool_kind": "max",
        "observation": 32,
        "reduction": "mean",
        "chunk": 20,
        "times_pool": 1,
        "decode_interval": 64,
    }
    if options.times is not None:
        second = get_policy(options.times).defaults
        values |= {field: value for field, value in second.items() if not field.startswith("pool")}
    values |= policy.defaults
    return replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})


def resolve(options: EvictionOptions, prompt_tokens: Sequence[int], layout: CacheLayout) -> EvictionPlan:
    """Resolve options for a prompt.

    Args:
        options: The request's options.
        prompt_tokens: Token ids of the prompt.
        layout: Shape of the cache.

    Returns:
        The plan.

    Raises:
        OptionError: options contradict each other, or do not fit this prompt.
    """
    check_options(options)
    asked, options = options, settle(options)
    policy, length = get_policy(options.policy), len(prompt_tokens)
    context = length if options.context_tokens is None else options.context_tokens
    for field, end in (
        ("protect", options.protect[-1][1] if options.protect else 0),
        ("context_tokens", context),
    ):
        if end > length:
            raise OptionError(field, f"ends at token {end}, past the prompt, which has {length} tokens")
    budget = _budget_tokens("budget", options, context, layout)
    k = context if budget is None else min(budget, context)
    options = _fit_observation(asked, options, policy, k)
    sinks, recent = _fit_prompt(options, policy, k, context)
    plan = EvictionPlan(
        policy=policy,
        options=options,
        needs=policy_needs(options),
        prompt_tokens=length,
        context_tokens=context,
        budget_tokens=k,
        decode_budget_tokens=_budget_tokens("decode_budget", options, length, layout),
        sink_tokens=sinks,
        recent_tokens=recent,
        decode_recent_tokens=_decode_recent(options, policy),
        protect=options.protect,
        seed=content_seed(prompt_tokens[:context]) if options.seed is None else options.seed % (1 << 64),
    )
    _check_decode(plan)
    return plan


def policy_needs(options: EvictionOptions) -> Needs:
    """What has to be observed of the queries for a request's policy and the one multiplied with it."""
    options = settle(options)
    second = get_policy(options.times).needs(options) if options.times else Needs()
    return get_policy(options.policy).needs(options) | second


def content_seed(prompt_tokens: Sequence[int]) -> int:
    """Derive a seed from token ids, 0 to 2^63 - 1; the same on every machine."""
    digest = hashlib.blake2b(np.asarray(prompt_tokens, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def parse_protect(value: object) -> tuple[Span, ...]:
    """Read protected spans.

    Args:
        value: "0-128,2048-2100", or [[0, 128], [2048, 2100]]: token indices, the end exclusive.

    Returns:
        Disjoint ascending spans; overlapping and adjacent ones are merged.

    Raises:
        ValueError: with a message for the user.
    """
    if isinstance(value, str):
        matches = [_SPAN.fullmatch(part.strip()) for part in value.split(",")]
        spans = [(int(match[1]), int(match[2])) if match else None for match in matches]
    elif isinstance(value, list | tuple):
        spans = [_json_span(span) for span in value]
    else:
        spans = [None]
    for span in spans:
        if span is None:
            raise ValueError("expected spans of prompt tokens like 0-128,2048-2100 (the end is exclusive)")
        if span[0] >= span[1]:
            raise ValueError(f"span {span[0]}-{span[1]} is empty or reversed (the end is exclusive)")
    return tuple(_merged(span for span in spans if span))


_SPAN = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9})")


def _json_span(span: object) -> Span | None:
    match span:
        case [int(start), int(end)] if (
            start >= 0 and not isinstance(start, bool) and not isinstance(end, bool)
        ):
            return start, end
    return None


def _integer(low: int, high: int = 2**31 - 1, odd: bool = False) -> Callable[[object], int]:
    def parse(value: object) -> int:
        text = str(value).strip()
        number = (
            int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) and not isinstance(value, bool) else None
        )
        if number is None or not low <= number <= high or (odd and number % 2 == 0):
            kind = "an odd integer" if odd else "an integer"
            raise ValueError(f"expected {kind} from {low} to {high}, not {str(value)[:40]!r}")
        return number

    return parse


def _fraction(value: object) -> float:
    text = str(value).strip()
    number = float(text) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", text) else None
    if number is None or number > 1:
        raise ValueError(f"expected a number from 0 to 1, not {str(value)[:40]!r}")
    return number


def _positive(value: object) -> float:
    text = str(value).strip()
    number = float(text) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", text) else 0.0
    if number < 1:
        raise ValueError(f"expected a number from 1, not {str(value)[:40]!r}")
    return number


def _policy(value: object) -> str:
    name = value.strip() if isinstance(value, str) else ""
    try:
        return get_policy(name if name.startswith(KVPRESS_PREFIX) else name.lower()).name
    except UnknownPolicy as error:
        raise ValueError(str(error)) from None


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        name = value.strip().lower() if isinstance(value, str) else None
        if name not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, not {str(value)[:40]!r}")
        return name

    return parse


_PARSERS: dict[str, Callable[[object], Any]] = {
    "policy": _policy,
    "budget": parse_budget,
    "decode_budget": parse_budget,
    "preset": _choice(*PRESETS),
    "sink_tokens": _integer(0),
    "recent_tokens": _integer(0),
    "protect": parse_protect,
    "seed": _integer(-(2**63), 2**63 - 1),
    "leverage": _choice("window", "norm", "sketch", "exact"),
    "rank": _integer(1, 1024),
    "window": _integer(1, 65536),
    "combine": _choice("product", "mean", "key", "value"),
    "pool": _integer(1, 1023, odd=True),
    "pool_kind": _choice("max", "mean"),
    "allocation": _choice("uniform", "adaptive", "pyramid"),
    "alpha": _fraction,
    "beta": _positive,
    "observation": _integer(1, 4096),
    "reduction": _choice("mean", "max"),
    "times": _policy,
    "times_pool": _integer(1, 1023, odd=True),
    "scorer": _choice("snapkv", "curdkv"),
    "chunk": _integer(1, 4096),
    "first_stage": _fraction,
    "future": _integer(1, 65536),
    "blend": _fraction,
    "block": _integer(8, 4096),
    "ladder": _integer(2),
    "decode_interval": _integer(1),
    "merge": _choice("none", "nearest"),
    "merge_threshold": _fraction,
    "context_tokens": _integer(1),
    "prefill": _choice("exact", "streaming"),
    "prefill_chunk": _integer(1),
}
_SCORING = {
    "leverage", "rank", "window", "combine", "pool", "pool_kind", "observation", "reduction", "scorer",
    "chunk", "first_stage", "future", "blend", "block", "ladder",
}  # fmt: skip
_OF_LEVERAGE = {"rank": "sketch", "window": "window"}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EvictionOptions)}


def _without_effect(options: EvictionOptions) -> dict[str, str]:
    """Options that do nothing, each with the option that makes it so."""
    policy, options = get_policy(options.policy), settle(options)
    reads = policy.reads | (get_policy(options.times).reads if options.times else frozenset())
    fields = dict.fromkeys(_SCORING - reads, "policy")
    if options.policy == "full":
        fields |= dict.fromkeys(("allocation", "times", "merge"), "policy")
    conditions = (
        *((field, "leverage", options.leverage == value) for field, value in _OF_LEVERAGE.items()),
        ("pool_kind", "pool", options.pool != 1),
        ("alpha", "allocation", options.allocation == "adaptive"),
        ("beta", "allocation", options.allocation == "pyramid"),
        ("times_pool", "times", options.times is not None),
        ("merge_threshold", "merge", options.merge != "none"),
        ("prefill_chunk", "prefill", options.prefill == "streaming"),
        ("context_tokens", "budget", options.budget is not None),
        ("prefill", "budget", options.budget is not None),
    )
    for field, other, works in conditions:
        if not works:
            fields.setdefault(field, other)
    return fields


def _budget_tokens(
    field: Literal["budget", "decode_budget"], options: EvictionOptions, length: int, layout: CacheLayout
) -> int | None:
    budget: Budget | None = getattr(options, field)
    if budget is None:
        return None
    slack = (options.decode_interval or 1) if field == "decode_budget" else 0
    tokens = budget.tokens(length, layout, ragged=options.allocation != "uniform", slack=slack)
    if tokens < 1:
        message = f"{budget} is too little for the pages of {layout.num_heads} heads in all layers"
        raise OptionError(field, message)
    return tokens


def _fit_observation(
    asked: EvictionOptions, options: EvictionOptions, policy: Policy, k: int
) -> EvictionOptions:
    """A window that was not asked for takes at most a quarter of the budget; one that was has to fit."""
    window = policy.window(options)
    if asked.observation is None:
        return replace(options, observation=max(1, min(window, k // 4))) if window else options
    if window > k:
        message = (
            f"the newest {window} tokens judge the others and are kept, but the budget keeps {k} per head"
        )
        raise OptionError("observation", message, ("budget",))
    return options


def _fit_prompt(options: EvictionOptions, policy: Policy, k: int, length: int) -> tuple[int, int]:
    """First and newest tokens that an eviction of the prompt to k tokens per head keeps.

    What the request asks for must fit; what the policy and the preset ask for takes the room that is left.
    """
    preset, sinks, recent = PRESETS[options.preset], options.sink_tokens, options.recent_tokens
    window = min(policy.window(options), length)
    spans = [(start, min(end, length)) for start, end in options.protect if start < length]
    newest = max(recent or 0, window)
    asked = [*spans, (0, min(sinks or 0, length)), (max(0, length - newest), length)]
    room = k - _covered(asked)
    if room < 0:
        names = [name for name in ("sink_tokens", "recent_tokens", "protect") if getattr(options, name)]
        names += ["observation"] if window and newest == window else []
        message = f"{' + '.join(names)} protect {k - room} tokens, but the budget keeps {k} per head"
        raise OptionError("budget", message, tuple(names))
    published = preset.sink_tokens is None
    if sinks is None:
        sinks = policy.published_sinks if published else max(policy.published_sinks, preset.sink_tokens or 0)
        sinks = min(sinks, room)
        room -= sinks
    if recent is None:
        recent = policy.published_recent if published or window else preset.recent_tokens
        recent = max(min(recent, k // 4), int(policy.recent_share * k))
        recent = min(recent, newest + room)
    return sinks, max(recent, window)


def _decode_recent(options: EvictionOptions, policy: Policy) -> int:
    if options.recent_tokens is not None:
        return max(options.recent_tokens, policy.window(options))
    return policy.window(options) or DECODE_RECENT_TOKENS


def _check_decode(plan: EvictionPlan) -> None:
    budget, recent = plan.decode_budget_tokens, plan.decode_recent_tokens
    protected = _covered([*plan.protect, (0, plan.sink_tokens)]) + recent
    if budget is not None and budget <= protected:
        names = ("sink_tokens", "recent_tokens", *(("protect",) if plan.protect else ()))
        message = (
            f"keeps {budget} tokens per head, not more than the {protected} that are always kept while "
            f"generating: the newest {recent} and {protected - recent} others ({', '.join(names)})"
        )
        raise OptionError("decode_budget", message, names)


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _covered(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in _merged(spans))
