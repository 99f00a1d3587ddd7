"""Options as headers and JSON give them: read, completed, and checked against each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from curkv.cache.budgets import Budget, parse_budget
from curkv.cache.options import PRESETS, EvictionOptions, OptionError, Span
from curkv.cache.policies import KVPRESS_PREFIX, get_policy
from curkv.cache.policies.base import UnknownPolicy


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
    return tuple(merged_spans(span for span in spans if span))


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


def merged_spans(spans: Iterable[Span]) -> list[Span]:
    """The same tokens as disjoint ascending spans."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
