"""Structural tags: free text in which what follows a trigger has a form, as in SGLang and vLLM."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from curkv.engine.types import InvalidRequest, Structure
from curkv.models.tools.base import compact, quoted
from curkv.server.limits import MAX_STRUCTURE_CHARACTERS, MAX_TAGS
from curkv.server.schemas import followed

_STRICT = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

Marker = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Tag(BaseModel):
    """A piece of JSON between two texts."""

    model_config = _STRICT

    begin: Marker
    schema_: dict[str, Any] = Field(alias="schema", description="What stands between.")
    end: Annotated[str, StringConstraints(max_length=MAX_STRUCTURE_CHARACTERS)]


class StructuralTagFormat(BaseModel):
    """Free text, but what begins like a trigger is one of the structures."""

    model_config = _STRICT

    type: Literal["structural_tag"]
    structures: Annotated[list[Tag], Field(min_length=1, max_length=MAX_TAGS)]
    triggers: Annotated[list[Marker], Field(min_length=1, max_length=MAX_TAGS)]


def tag_structure(tags: StructuralTagFormat, param: str) -> Structure:
    """The same as a grammar.

    Raises:
        InvalidRequest: a structure begins with none of the triggers, or a trigger begins none.
    """
    rules, heads = [r"TEXT: /(.|\n)*/"], []
    ignored: dict[str, None] = {}
    for i, trigger in enumerate(tags.triggers):
        ways = [(j, tag) for j, tag in enumerate(tags.structures) if tag.begin.startswith(trigger)]
        if not ways:
            raise InvalidRequest(f"no structure begins with the trigger {trigger!r:.80}", param)
        heads.append(f"head_{i} ({' | '.join(f'tag_{i}_{j}' for j, _ in ways)})")
        rules.append(f"head_{i}[lazy]: TEXT {quoted(trigger)}")
        for j, tag in ways:
            parts = (quoted(tag.begin.removeprefix(trigger)), f"json_{j}", quoted(tag.end))
            rules.append(f"tag_{i}_{j}: {' '.join(part for part in parts if part)}")
    for j, tag in enumerate(tags.structures):
        if not any(tag.begin.startswith(trigger) for trigger in tags.triggers):
            raise InvalidRequest(f"no trigger begins the structure {tag.begin!r:.80}", param)
        schema, left_out = followed(tag.schema_)
        ignored |= dict.fromkeys(left_out)
        rules.append(f"json_{j}: %json {json.dumps(compact(schema))}")
    grammar = "\n".join([f"start: ({' | '.join(heads)})* TEXT", *rules])
    return Structure("lark", grammar, param, tuple(ignored))
