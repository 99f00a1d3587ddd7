"""A request's eviction options: read, checked against each other, and resolved for one prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curkv.cache.budgets import Budget, parse_budget
from curkv.cache.policies import get_policy, policy_names
from curkv.cache.policies.base import Policy

if TYPE_CHECKING:
    from curkv.cache.kv_cache import CacheLayout

Span = tuple[int, int]

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

    leverage: Literal["window", "sketch"]
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
        leverage: CurDKV's energies: "window" (shares of ||k||^2 in windows) or "sketch" (random projection).
        rank: Columns of the sketch, 20 in the paper (section 3).
        window: Tokens of a window, 16 in the authors' code.
        combine: How CurDKV combines the terms of key and value.
        pool: Odd kernel size of a 1-D pooling of the scores over a head's stored tokens; 1 or None is off.
        pool_kind: What the pooling takes of its neighbourhood.
        alpha: Share of the kept tokens that each head is sure of under adaptive allocation, 0.2 in Ada-KV.
        decode_interval: Generated tokens between two evictions, 64 in VaSE.
    """

    policy: str = "full"
    budget: Budget | None = None
    decode_budget: Budget | None = None
    preset: str = "serving"
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    protect: tuple[Span, ...] = ()
    seed: int | None = None
    leverage: Literal["window", "sketch"] | None = None
    rank: int = 20
    window: int = 16
    combine: Literal["product", "mean", "key", "value"] = "product"
    pool: int | None = None
    pool_kind: Literal["max", "mean"] = "max"
    alpha: float = 0.2
    decode_interval: int = 64

    @property
    def partial_window(self) -> Literal["corrected", "left", "right"]:
        """How the preset treats a partial window."""
        return PRESETS[self.preset].partial_window


@dataclass(frozen=True)
class EvictionPlan:
    """A request's options resolved for its prompt; nothing in it contradicts anything else.

    Attributes:
        policy: The policy.
        options: The options with the preset filled in.
        prompt_tokens: Length of the prompt.
        budget_tokens: Tokens kept per head, on average, at the end of prefill; at most the prompt's.
        decode_budget_tokens: Tokens held per head above which an eviction is due during decode; None: never.
        sink_tokens: First tokens that are always kept.
        recent_tokens: Newest tokens kept at the end of prefill.
        decode_recent_tokens: Newest tokens kept by an eviction during decode.
        protect: Spans of the prompt that are always kept.
        seed: Of random numbers, at least 0.
    """

    policy: Policy
    options: EvictionOptions
    prompt_tokens: int
    budget_tokens: int
    decode_budget_tokens: int | None
    sink_tokens: int
    recent_tokens: int
    decode_recent_tokens: int
    protect: tuple[Span, ...]
    seed: int

    @property
    def evicts_prompt(self) -> bool:
        """Whether anything is evicted at the end of prefill."""
        return self.budget_tokens < self.prompt_tokens

    def decode_due(self, generated_tokens: int, held_tokens: float) -> bool:
        """Whether to evict after a decode step.

        Args:
            generated_tokens: Stored since the prompt.
            held_tokens: Per head, on average.
        """
        budget = self.decode_budget_tokens
        interval = self.options.decode_interval
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
            raise OptionError(field, f"unknown option; there are {', '.join(_PARSERS)}")
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
    for field, other in _without_effect(options).items():
        if getattr(options, field) != _DEFAULTS[field]:
            value = _leverage(options) if other == "leverage" else getattr(options, other)
            raise OptionError(field, f"has no effect with {other} {value!r}", (other,))


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
    policy, length = get_policy(options.policy), len(prompt_tokens)
    if options.protect and options.protect[-1][1] > length:
        start, end = options.protect[-1]
        raise OptionError("protect", f"span {start}-{end} ends past the prompt, which has {length} tokens")
    budget = _budget_tokens("budget", options, policy, length, layout)
    k = length if budget is None else min(budget, length)
    sinks, recent = _fit_prompt(options, policy, k, length)
    plan = EvictionPlan(
        policy=policy,
        options=replace(options, leverage=_leverage(options), pool=options.pool or 1),
        prompt_tokens=length,
        budget_tokens=k,
        decode_budget_tokens=_budget_tokens("decode_budget", options, policy, length, layout),
        sink_tokens=sinks,
        recent_tokens=recent,
        decode_recent_tokens=DECODE_RECENT_TOKENS if options.recent_tokens is None else options.recent_tokens,
        protect=options.protect,
        seed=content_seed(prompt_tokens) if options.seed is None else options.seed % (1 << 64),
    )
    _check_decode(plan)
    return plan


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


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        name = value.strip().lower() if isinstance(value, str) else None
        if name not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, not {str(value)[:40]!r}")
        return name

    return parse


_PARSERS: dict[str, Callable[[object], Any]] = {
    "policy": _choice(*policy_names()),
    "budget": parse_budget,
    "decode_budget": parse_budget,
    "preset": _choice(*PRESETS),
    "sink_tokens": _integer(0),
    "recent_tokens": _integer(0),
    "protect": parse_protect,
    "seed": _integer(-(2**63), 2**63 - 1),
    "leverage": _choice("window", "sketch"),
    "rank": _integer(1, 1024),
    "window": _integer(1, 65536),
    "combine": _choice("product", "mean", "key", "value"),
    "pool": _integer(1, 1023, odd=True),
    "pool_kind": _choice("max", "mean"),
    "alpha": _fraction,
    "decode_interval": _integer(1),
}
_SCORING = {"leverage", "rank", "window", "combine", "pool", "pool_kind", "alpha"}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EvictionOptions)}


def _without_effect(options: EvictionOptions) -> dict[str, str]:
    """Scoring options that do nothing, each with the option that makes it so."""
    fields = dict.fromkeys(_SCORING - get_policy(options.policy).reads, "policy")
    if "leverage" not in fields:
        fields["window" if _leverage(options) == "sketch" else "rank"] = "leverage"
    if (options.pool or 1) == 1:
        fields.setdefault("pool_kind", "pool")
    return fields


def _leverage(options: EvictionOptions) -> Literal["window", "sketch"]:
    return options.leverage or PRESETS[options.preset].leverage


def _budget_tokens(
    field: Literal["budget", "decode_budget"],
    options: EvictionOptions,
    policy: Policy,
    length: int,
    layout: CacheLayout,
) -> int | None:
    budget: Budget | None = getattr(options, field)
    if budget is None:
        return None
    slack = options.decode_interval if field == "decode_budget" else 0
    tokens = budget.tokens(length, layout, adaptive=policy.allocation == "adaptive", slack=slack)
    if tokens < 1:
        message = f"{budget} is too little for the pages of {layout.num_heads} heads in all layers"
        raise OptionError(field, message)
    return tokens


def _fit_prompt(options: EvictionOptions, policy: Policy, k: int, length: int) -> tuple[int, int]:
    """First and newest tokens that an eviction of the prompt to k tokens per head keeps.

    What the request asks for must fit; what the preset asks for takes the room that is left.
    """
    preset, sinks, recent = PRESETS[options.preset], options.sink_tokens, options.recent_tokens
    asked = [*options.protect, (0, min(sinks or 0, length)), (max(0, length - (recent or 0)), length)]
    room = k - _covered(asked)
    if room < 0:
        names = tuple(name for name in ("sink_tokens", "recent_tokens", "protect") if getattr(options, name))
        message = f"{' + '.join(names)} protect {k - room} tokens, but the budget keeps {k} per head"
        raise OptionError("budget", message, names)
    if sinks is None:
        sinks = min(policy.published_sinks if preset.sink_tokens is None else preset.sink_tokens, room)
        room -= sinks
    return sinks, min(preset.recent_tokens, k // 4, room) if recent is None else recent


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
