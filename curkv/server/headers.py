"""Eviction controls of a request: the `X-KV-*` headers and the body's `kv` object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from starlette.datastructures import Headers

from curkv.cache.catalogue import catalogue
from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.parsing import parse_options
from curkv.config import Settings
from curkv.engine.types import InvalidRequest
from curkv.server.limits import MAX_OPTION_CHARACTERS, MAX_PROTECTED_SPANS

_PREFIX = "x-kv-"

HEADERS = {
    "X-KV-Policy": "policy",
    "X-KV-Budget": "budget",
    "X-KV-Decode-Budget": "decode_budget",
    "X-KV-Sink-Tokens": "sink_tokens",
    "X-KV-Recent-Tokens": "recent_tokens",
    "X-KV-Protect": "protect",
    "X-KV-Seed": "seed",
    "X-KV-Session": "session",
}
"""Header to field of `kv`. Both go through the field's one parser, `session_name` or `parse_options`."""

_FIELD_OF = {header.lower(): field for header, field in HEADERS.items()}
_HEADER_OF = {field: header for header, field in HEADERS.items()}

_SESSION = re.compile(r"[A-Za-z0-9._:@+=~-]{1,128}")
_SESSION_SCHEMA = {
    "type": "string",
    "pattern": f"^{_SESSION.pattern}$",
    "description": "Conversation that the request goes on, whose cache is held for its next turn.",
    "examples": ["chat-1"],
}
_SCHEMAS = {name: entry.schema for name, entry in catalogue().items()} | {"session": _SESSION_SCHEMA}


def _check_object(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be an object such as {'policy': 'curdkv', 'budget': '25%'}")
    for field, given in (value or {}).items():
        if isinstance(given, str) and len(given) > MAX_OPTION_CHARACTERS:
            raise ValueError(f"{field:.40}: has more than {MAX_OPTION_CHARACTERS} characters")
        if isinstance(given, list) and len(given) > MAX_PROTECTED_SPANS:
            raise ValueError(f"{field:.40}: has more than {MAX_PROTECTED_SPANS} entries")
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
    "X-Structure-Ignored": {
        "description": "What of the answer's schema is not followed, if anything is not.",
        "schema": {"type": "string"},
    },
}


@dataclass(frozen=True)
class EvictionControls:
    """A request's eviction options, and where each was said.

    Attributes:
        options: the options.
        in_headers: fields that a header gave.
        in_body: fields that the body's `kv` gave and no header.
        session: name of the conversation that it goes on; "": none.
    """

    options: EvictionOptions
    in_headers: frozenset[str]
    in_body: frozenset[str]
    session: str = ""

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
        return error.of(_param(field, self.in_headers, self.in_body))


def default_options(settings: Settings) -> EvictionOptions:
    """Options of a request that says nothing; its budgets give way to what a request makes possible.

    Raises:
        OptionError: the server's settings are wrong; the field is one of `kv`.
    """
    options = parse_options(
        {
            "policy": settings.kv.policy,
            "budget": settings.kv.budget,
            "decode_budget": settings.kv.decode_budget,
        }
    )
    return replace(options, bending=frozenset({"budget", "decode_budget"}))


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
    given = {**from_body, **from_headers}
    try:
        session = session_name(given.pop("session", ""))
        options = parse_options(given, defaults)
    except OptionError as error:
        raise InvalidRequest(error.message, _param(error.field, in_headers, in_body)) from error
    return EvictionControls(options, in_headers, in_body, session)


def session_name(value: object) -> str:
    """Reads the name of a session; "" is none.

    Raises:
        OptionError: it is no name.
    """
    if value == "" or (isinstance(value, str) and _SESSION.fullmatch(value)):
        return str(value)
    raise OptionError("session", "expected 1 to 128 of the letters a-z, A-Z, the digits, and . _ : @ + = ~ -")


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
