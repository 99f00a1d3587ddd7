"""JSON schemas such as people write for tools, drawn at random."""

from __future__ import annotations

import random
from typing import Any


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of an object whose strings and lists are bounded, so that what follows it ends.

    Args:
        draw: source of randomness.
        depth: how deep objects and lists are within each other.
    """
    names = draw.sample(["city", "days", "unit", "note", "flags"], draw.randint(0, 4))
    required = [name for name in names if draw.random() < 0.5]
    properties = {name: _value(draw, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "limited", "null", "pattern", "either"]
    kind = draw.choice(kinds + ["array", "object"] * (depth > 0))
    match kind:
        case "enum":
            return {"type": "string", "enum": draw.sample(["red", "gr\u00fcn", 'b"lue', "<b>"], 2)}
        case "integer" | "number":
            return {"type": kind, "minimum": -1000, "maximum": 1000}
        case "limited":
            return {"type": "integer", "minimum": 1, "maximum": draw.randint(2, 400)}
        case "string":
            return {"type": "string", "maxLength": draw.randint(1, 8)}
        case "pattern":
            return {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}
        case "either":
            return {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]}
        case "array":
            return {"type": "array", "items": _value(draw, depth - 1), "maxItems": 2}
        case "object":
            return random_schema(draw, depth - 1)
    return {"type": kind}
