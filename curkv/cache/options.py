"""What a request asks of its cache, and what becomes of it where it says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from curkv.cache.allocation import ALLOCATIONS
from curkv.cache.budgets import Budget, parse_budget
from curkv.cache.declarations import SHARE, Choice, Integer, Kind, option, unless, when
from curkv.cache.observations import Needs
from curkv.cache.policies import KVPRESS_PREFIX, get_policy, policy_names
from curkv.cache.policies.base import POOLING, Policy, UnknownPolicy
from curkv.cache.presets import PRESETS, Preset

Span = tuple[int, int]


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
class PolicyName(Kind):
    """The name of a policy, or `kvpress:` and that of a press."""

    def parse(self, value: object) -> str:
        """Read it in any case, and see that the policy can be had."""
        name = value.strip() if isinstance(value, str) else ""
        try:
            return get_policy(name if name.startswith(KVPRESS_PREFIX) else name.lower()).name
        except UnknownPolicy as error:
            raise ValueError(str(error)) from None

    @property
    def schema(self) -> dict[str, Any]:
        """The names, or those of presses."""
        press = {"type": "string", "pattern": f"^{KVPRESS_PREFIX}[A-Za-z]+$"}
        return {"anyOf": [{"enum": list(policy_names())}, press]}

    @property
    def words(self) -> str:
        """What they are."""
        return "a policy"


@dataclass(frozen=True)
class BudgetKind(Kind):
    """A budget in one of its forms."""

    def parse(self, value: object) -> Budget:
        """Read it."""
        return parse_budget(value)

    @property
    def schema(self) -> dict[str, Any]:
        """A string or a number."""
        return {"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}

    @property
    def words(self) -> str:
        """The forms."""
        return "`25%`, `0.25`, `512`, `512tok`, `8MiB`"


@dataclass(frozen=True)
class Spans(Kind):
    """Spans of tokens."""

    def parse(self, value: object) -> tuple[Span, ...]:
        """Read them; overlapping and adjacent ones are merged.

        Args:
            value: "0-128,2048-2100", or [[0, 128], [2048, 2100]]: token indices, the end exclusive.
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
                raise ValueError(
                    "expected spans of prompt tokens like 0-128,2048-2100 (the end is exclusive)"
                )
            if span[0] >= span[1]:
                raise ValueError(f"span {span[0]}-{span[1]} is empty or reversed (the end is exclusive)")
        return tuple(merged_spans(span for span in spans if span))

    @property
    def schema(self) -> dict[str, Any]:
        """A string, or pairs of numbers."""
        pair = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": pair}]}

    @property
    def words(self) -> str:
        """The two forms."""
        return "`0-128,2048-2100`, `[[0, 128]]`"


_SPAN = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9})")


def _json_span(span: object) -> Span | None:
    match span:
        case [int(start), int(end)] if (
            start >= 0 and not isinstance(start, bool) and not isinstance(end, bool)
        ):
            return start, end
    return None


def merged_spans(spans: Iterable[Span]) -> list[Span]:
    """The same tokens as disjoint ascending spans."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


_POLICY = PolicyName()
_BUDGET = BudgetKind()
_COUNT = Integer(0)
_EVICTING = unless(policy="full")
_OF_PROMPT = unless(budget=None)


@dataclass(frozen=True)
class EvictionOptions:
    """What a request asks of its cache. None means what the policy and the preset say.

    The fields are what every policy has; options that only some policies and allocations have are in `own`.

    Attributes:
        own: Values of the options that the policy, the one it is multiplied with, and the allocation declare.
        bending: Fields whose value is the server's and not the request's: they give way to what is possible.
    """

    policy: str = option(
        "full", _POLICY, "What decides which tokens are kept.", examples=("curdkv", "snapcur")
    )
    budget: Budget | None = option(
        None,
        _BUDGET,
        "What the prompt's cache may keep: a share (25%, 0.25), tokens per head on average (512, 512tok) or "
        "bytes of the whole request (8MiB).",
        examples=("25%", "512tok", "8MiB"),
    )
    decode_budget: Budget | None = option(
        None,
        _BUDGET,
        "The same forms: what may be held while generating; absent: no eviction then.",
        examples=("1024tok",),
    )
    preset: str = option(
        "serving", Choice(tuple(PRESETS)), "Named settings: as recommended here, or as published."
    )
    sink_tokens: int | None = option(None, _COUNT, "First tokens that are always kept.", examples=(4,))
    recent_tokens: int | None = option(None, _COUNT, "Newest tokens that are always kept.", examples=(64,))
    protect: tuple[Span, ...] = option(
        (),
        Spans(),
        "Spans of prompt tokens that are never evicted, the end exclusive.",
        examples=("0-128,2048-2100",),
    )
    seed: int | None = option(
        None,
        Integer(-(2**63), 2**63 - 1),
        "Seed of random policies and sketches; absent: derived from the prompt, so that a repeat is one.",
        examples=(7,),
    )
    allocation: str | None = option(
        None,
        Choice(tuple(ALLOCATIONS)),
        "How heads and layers share the budget; absent: as the policy was published.",
        effective=_EVICTING,
    )
    times: str | None = option(
        None,
        _POLICY,
        "A second policy whose scores are multiplied with those of the first.",
        effective=_EVICTING,
    )
    times_pool: int | None = option(
        None,
        POOLING,
        "Odd size of the pooling over the second policy's scores.",
        effective=unless(times=None),
    )
    decode_interval: int | None = option(None, Integer(1), "Generated tokens between two evictions.")
    merge: Literal["none", "nearest"] = option(
        "none",
        Choice(("none", "nearest")),
        "What becomes of evicted tokens: dropped, or their values merged into those of the most similar kept "
        "key of their head.",
        effective=_EVICTING,
    )
    merge_threshold: float = option(
        0.6, SHARE, "Least cosine of two keys whose values are merged.", effective=unless(merge="none")
    )
    context_tokens: int | None = option(
        None,
        Integer(1),
        "First tokens of the prompt that are compressed before the rest is computed; the rest is kept.",
        effective=_OF_PROMPT,
    )
    prefill: Literal["exact", "streaming"] = option(
        "exact",
        Choice(("exact", "streaming")),
        "Evict once, when the prompt is computed, or to the budget after every chunk of it.",
        effective=_OF_PROMPT,
    )
    prefill_chunk: int = option(
        512, Integer(1), "Tokens of such a chunk.", effective=when(prefill="streaming")
    )
    own: Mapping[str, Any] = field(default_factory=dict)
    bending: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SettledOptions:
    """What a request's options mean once policy and preset have filled in what it does not say.

    Attributes:
        policy: With its options and its allocation, and multiplied with a second one if it is to be.
        preset: The settings it follows.
        budget: What may be kept of the prompt; None keeps all of it.
        decode_budget: What may be held while generating; None: generated tokens are not evicted.
        sink_tokens: First tokens that the request wants kept; None: it says nothing.
        recent_tokens: Newest tokens that the request wants kept; None: it says nothing.
        protect: Spans (start, end) of the prompt that are always kept; disjoint and ascending.
        seed: Of random numbers; None: derived from the prompt.
        decode_interval: Generated tokens between two evictions.
        merge_threshold: Least cosine of two keys whose values are merged; None: evicted tokens are dropped.
        context_tokens: First tokens of the prompt that are compressed; None: all.
        prefill_chunk: Tokens between two evictions of the prompt; None: it is evicted once, when all is
            computed.
    """

    policy: Policy
    preset: Preset
    budget: Budget | None
    decode_budget: Budget | None
    sink_tokens: int | None
    recent_tokens: int | None
    protect: tuple[Span, ...]
    seed: int | None
    decode_interval: int
    merge_threshold: float | None
    context_tokens: int | None
    prefill_chunk: int | None

    @property
    def needs(self) -> Needs:
        """What has to be observed of the queries, for the policy and for its allocation."""
        return self.policy.needs | self.policy.allocation.needs
