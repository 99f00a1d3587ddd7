"""Eviction controls of a request: the `X-KV-*` headers and the body's `kv` object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from starlette.datastructures import Headers

from curkv.cache.options import PRESETS, EvictionOptions, OptionError
from curkv.cache.parsing import parse_options
from curkv.cache.policies import KVPRESS_PREFIX, policy_names
from curkv.config import Settings
from curkv.engine.types import InvalidRequest

_PREFIX = "x-kv-"

HEADERS = {
    "X-KV-Policy": "policy",
    "X-KV-Budget": "budget",
    "X-KV-Decode-Budget": "decode_budget",
    "X-KV-Sink-Tokens": "sink_tokens",
    "X-KV-Recent-Tokens": "recent_tokens",
    "X-KV-Protect": "protect",
    "X-KV-Seed": "seed",
}
"""Header to field of `kv`. Both go through the field's one parser, that of `parse_options`."""

_FIELD_OF = {header.lower(): field for header, field in HEADERS.items()}
_HEADER_OF = {field: header for header, field in HEADERS.items()}

_BUDGET = {"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}
_COUNT = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}

_SCHEMAS: dict[str, dict[str, Any]] = {
    "policy": {
        "anyOf": [
            {"enum": list(policy_names())},
            {"type": "string", "pattern": f"^{KVPRESS_PREFIX}[A-Za-z]+$"},
        ],
        "description": "What decides which tokens are kept.",
        "examples": ["curdkv", "snapcur"],
    },
    "budget": {
        **_BUDGET,
        "description": "What the prompt's cache may keep: a share (25%, 0.25), tokens per head on average "
        "(512, 512tok) or bytes of the whole request (8MiB).",
        "examples": ["25%", "512tok", "8MiB"],
    },
    "decode_budget": {
        **_BUDGET,
        "description": "The same forms: what may be held while generating; absent: no eviction then.",
        "examples": ["1024tok"],
    },
    "sink_tokens": {**_COUNT, "description": "First tokens that are always kept.", "examples": [4]},
    "recent_tokens": {**_COUNT, "description": "Newest tokens that are always kept.", "examples": [64]},
    "protect": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
            },
        ],
        "description": "Spans of prompt tokens that are never evicted, the end exclusive.",
        "examples": ["0-128,2048-2100"],
    },
    "seed": {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "description": "Seed of random policies and sketches; absent: derived from the prompt.",
        "examples": [7],
    },
    "preset": {
        "enum": list(PRESETS),
        "description": "Named settings: as recommended here, or as published.",
    },
    "leverage": {
        "enum": ["window", "norm", "sketch", "exact"],
        "description": "How CurDKV measures keys and values.",
    },
    "rank": {"type": "integer", "description": "Columns of the sketch."},
    "window": {"type": "integer", "description": "Tokens of a window of windowed leverage."},
    "combine": {
        "enum": ["product", "mean", "key", "value"],
        "description": "How key and value terms combine.",
    },
    "pool": {"type": "integer", "description": "Odd size of the pooling over scores; 1 is off."},
    "pool_kind": {"enum": ["max", "mean"], "description": "What pooling takes of its neighbourhood."},
    "allocation": {
        "enum": ["uniform", "adaptive", "pyramid"],
        "description": "How heads and layers share the budget; absent: as the policy was published.",
    },
    "alpha": {
        "type": "number",
        "description": "Share of the kept tokens each head is sure of under adaptive allocation.",
    },
    "beta": {"type": "number", "description": "Steepness of the pyramid."},
    "observation": {"type": "integer", "description": "Newest tokens whose queries judge the others."},
    "reduction": {"enum": ["mean", "max"], "description": "What counts of the observed attention."},
    "times": {"type": "string", "description": "A policy whose scores are multiplied with the first one's."},
    "times_pool": {"type": "integer", "description": "Odd size of the pooling over its scores."},
    "scorer": {"enum": ["snapkv", "curdkv"], "description": "Whose scores ChunkKV takes."},
    "chunk": {"type": "integer", "description": "Tokens of ChunkKV's chunks and of SnapCUR's passages."},
    "first_stage": {
        "type": "number",
        "description": "Share of the budget for CriticalKV's attention, SnapCUR's passages.",
    },
    "future": {"type": "integer", "description": "Positions that Expected Attention averages over."},
    "blend": {"type": "number", "description": "Weight of leverage beside attention in Compactor."},
    "block": {"type": "integer", "description": "Tokens of a block of Compactor's attention."},
    "ladder": {"type": "integer", "description": "Tokens over which LaCache's pattern repeats."},
    "decode_interval": {"type": "integer", "description": "Generated tokens between two evictions."},
    "merge": {
        "enum": ["none", "nearest"],
        "description": "What becomes of evicted tokens: dropped, or merged into the most similar kept key.",
    },
    "merge_threshold": {"type": "number", "description": "Least cosine of two keys that are merged."},
    "context_tokens": {
        "type": "integer",
        "minimum": 1,
        "description": "First tokens of the prompt that are compressed before the rest is computed.",
    },
    "prefill": {
        "enum": ["exact", "streaming"],
        "description": "Evict once, when the prompt is computed, or to the budget after every chunk of it.",
    },
    "prefill_chunk": {"type": "integer", "minimum": 1, "description": "Tokens of such a chunk."},
}


def _check_object(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be an object such as {'policy': 'curdkv', 'budget': '25%'}")
    return value


KVFields = Annotated[
    dict[str, Any],
    BeforeValidator(_check_object),
    WithJsonSchema(
        {"type": "object", "properties": _SCHEMAS, "additionalProperties": False, "title": "KVFields"}
    ),
]
"""The body's `kv` object; `eviction_controls` checks what is in it."""

OPENAPI_PARAMETERS = [
    {
        "name": header,
        "in": "header",
        "required": False,
        "description": _SCHEMAS[field]["description"],
        "schema": {"type": "string"},
    }
    for header, field in HEADERS.items()
]

OPENAPI_RESPONSE_HEADERS = {
    "X-KV-Policy": {"description": "The policy that was used.", "schema": {"type": "string"}},
    "X-KV-Budget-Tokens": {
        "description": "Tokens per head, on average, that a prompt may keep; a mean over prompts.",
        "schema": {"type": "integer"},
    },
}


@dataclass(frozen=True)
class EvictionControls:
    """A request's eviction options, and where each was said.

    Attributes:
        options: the options.
        in_headers: fields that a header gave.
        in_body: fields that the body's `kv` gave and no header.
    """

    options: EvictionOptions
    in_headers: frozenset[str]
    in_body: frozenset[str]

    def for_context(self, tokens: int | None) -> EvictionOptions:
        """The options of a prompt whose first `tokens` tokens the client marked as its context.

        What the request says itself wins, and where no prompt is evicted there is no boundary to respect.
        """
        if tokens is None or self.options.budget is None or self.options.context_tokens is not None:
            return self.options
        return replace(self.options, context_tokens=tokens)

    def named(self, error: InvalidRequest) -> InvalidRequest:
        """The same error with `kv.<field>` replaced by the header that gave the field."""
        field = (error.param or "").removeprefix("kv.")
        if field == error.param:
            return error
        return InvalidRequest(error.message, _param(field, self.in_headers, self.in_body))


def default_options(settings: Settings) -> EvictionOptions:
    """Options of a request that says nothing.

    Raises:
        OptionError: the server's settings are wrong; the field is one of `kv`.
    """
    return parse_options(
        {
            "policy": settings.kv.policy,
            "budget": settings.kv.budget,
            "decode_budget": settings.kv.decode_budget,
        }
    )


def eviction_controls(
    headers: Headers, body: Mapping[str, Any] | None, defaults: EvictionOptions
) -> EvictionControls:
    """Reads what a request says about its cache: headers over body over the server's defaults.

    Raises:
        InvalidRequest: a value is wrong, a name unknown, or two options contradict each other; `param` is the
            header or `kv.<field>`.
    """
    from_headers = _read_headers(headers)
    from_body = {f: v for f, v in (body or {}).items() if f not in from_headers and v is not None}
    in_headers, in_body = frozenset(from_headers), frozenset(from_body)
    try:
        options = parse_options({**from_body, **from_headers}, defaults)
    except OptionError as error:
        raise InvalidRequest(error.message, _param(error.field, in_headers, in_body)) from error
    return EvictionControls(options, in_headers, in_body)


def _read_headers(headers: Headers) -> dict[str, str]:
    """Field to text. A misspelt or repeated header is refused: ignoring it would be to disobey silently."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        if not name.startswith(_PREFIX):
            continue
        field = _FIELD_OF.get(name)
        if field is None:
            raise InvalidRequest(f"unknown header; there are {', '.join(HEADERS)}", _spelt(name))
        if field in found:
            raise InvalidRequest("the header is given twice", _HEADER_OF[field])
        found[field] = value
    return found


def _param(field: str, in_headers: frozenset[str], in_body: frozenset[str]) -> str:
    """Where the caller should look: a field given nowhere is named like the ones that were given."""
    by_header = field in in_headers or (field not in in_body and bool(in_headers))
    return _HEADER_OF[field] if by_header and field in _HEADER_OF else f"kv.{field}"


def _spelt(name: str) -> str:
    return "-".join(
        part.upper() if part in ("x", "kv") else part.capitalize() for part in name[:64].split("-")
    )
