"""Keywords of JSON schemas that are not followed while generating."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ONE = ("additionalProperties", "items", "contains", "propertyNames", "if", "then", "else")
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_WORD_EDGE = re.compile(r"(?<!\\)((?:\\\\)*)\\[bB]")


def followed(schema: Any) -> tuple[Any, tuple[str, ...]]:
    """What of a schema can be followed while generating.

    `uniqueItems` and `not` cannot, nor can `\\\\b` in a pattern: what is left allows all that the schema
    allows, and more.

    Returns:
        The schema without these, and what was left out.
    """
    ignored: dict[str, None] = {}
    return _followed(schema, ignored), tuple(ignored)


def _followed(schema: Any, ignored: dict[str, None]) -> Any:
    if not isinstance(schema, dict):
        return schema
    left: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "not" or (key == "uniqueItems" and value is not False):
            ignored[key] = None
        elif key == "pattern" and isinstance(value, str) and _WORD_EDGE.search(value):
            ignored["\\b"] = None
            left[key] = _WORD_EDGE.sub(r"\1", value)
        elif key in _NAMED and isinstance(value, Mapping):
            left[key] = {name: _followed(part, ignored) for name, part in value.items()}
        elif key in _LIST and isinstance(value, list):
            left[key] = [_followed(part, ignored) for part in value]
        elif key in _ONE:
            left[key] = _followed(value, ignored)
        else:
            left[key] = value
    return left
