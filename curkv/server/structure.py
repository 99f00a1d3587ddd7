"""Fields that give an output a form, in the words of OpenAI's API, vLLM's, SGLang's and llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from curkv.engine.types import InvalidRequest, Structure
from curkv.models.tools.base import GUIDANCE
from curkv.server.limits import MAX_STRUCTURE_CHARACTERS, MAX_STRUCTURE_CHOICES
from curkv.server.schemas import followed
from curkv.server.structural_tags import StructuralTagFormat, tag_structure

Expression = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STRUCTURE_CHARACTERS)]
Choices = Annotated[list[Expression], Field(fail_fast=True, min_length=1, max_length=MAX_STRUCTURE_CHOICES)]
Schema = dict[str, Any] | Expression
_STRICT = ConfigDict(strict=True, protected_namespaces=())
_OBJECT = {"type": "object"}


class PlainFormat(BaseModel):
    """Free text."""

    model_config = _STRICT

    type: Literal["text"]


class ObjectFormat(BaseModel):
    """A JSON object."""

    model_config = _STRICT

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="As llama.cpp takes one.")


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI's API wants it."""

    model_config = _STRICT

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Absent: any JSON object.")
    strict: bool | None = Field(None, description="Refuse a schema if a keyword cannot be followed.")


class SchemaFormat(BaseModel):
    """JSON that follows a schema."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="As llama.cpp takes one.")


class GrammarFormat(BaseModel):
    """Text that follows a grammar."""

    model_config = _STRICT

    type: Literal["grammar"]
    grammar: Expression


Format = Annotated[
    PlainFormat | ObjectFormat | SchemaFormat | GrammarFormat | StructuralTagFormat,
    Field(discriminator="type"),
]


class StructuredOutputs(BaseModel):
    """Exactly one of these, as in vLLM."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    json_: Schema | None = Field(None, alias="json", description="JSON schema.")
    regex: Expression | None = Field(None, description="Expression that the whole output matches.")
    choice: Choices | None = Field(None, description="Texts of which the output is one.")
    grammar: Expression | None = Field(None, description="Grammar in Lark, EBNF or GBNF.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    structural_tag: Expression | None = Field(
        None, description="JSON of a `response_format` `structural_tag`."
    )
    disable_any_whitespace: bool | None = Field(
        None, description="false: the model may put white space between the values of JSON."
    )
    disable_fallback: bool | None = Field(None, description="Accepted: there is one backend.")


class StructureFields(BaseModel):
    """Fields of a request that give its output a form; those that are used must ask for the same."""

    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="Older form of structured_outputs.json.")
    guided_regex: Expression | None = Field(None, description="Older form of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="Older form of structured_outputs.choice.")
    guided_grammar: Expression | None = Field(None, description="Older form of structured_outputs.grammar.")
    regex: Expression | None = Field(None, description="SGLang's name of guided_regex.")
    ebnf: Expression | None = Field(None, description="SGLang's name of guided_grammar.")
    grammar: Expression | None = Field(None, description="llama.cpp's name of guided_grammar.")
    json_schema: Schema | None = Field(None, description="SGLang's and llama.cpp's name of guided_json.")

    @property
    def structure(self) -> Structure | None:
        """The form of the output, None if it is free.

        Raises:
            InvalidRequest: two different ones were asked for, or one is too large, or is no JSON.
        """
        asked = [structure for structure in self._asked() if structure.source is not None]
        for structure in asked:
            if _is_longer(structure.source, MAX_STRUCTURE_CHARACTERS):
                raise InvalidRequest(f"is longer than {MAX_STRUCTURE_CHARACTERS} characters", structure.param)
            if structure is not asked[0] and _compared(structure) != _compared(asked[0]):
                raise InvalidRequest(f"asks for something else than {asked[0].param}", structure.param)
        return asked[0] if asked else None

    def _asked(self) -> Iterator[Structure]:
        """All forms; the source of one that is not asked for is None."""
        yield self._response
        outputs, name = self.structured_outputs or StructuredOutputs.model_construct(), "structured_outputs"
        spaces = outputs.disable_any_whitespace is False
        yield _json(outputs.json_, f"{name}.json", spaces=spaces)
        yield Structure("regex", outputs.regex, f"{name}.regex")
        yield Structure("choice", outputs.choice, f"{name}.choice")
        yield Structure("grammar", outputs.grammar, f"{name}.grammar")
        yield _json(_OBJECT if outputs.json_object else None, f"{name}.json_object", spaces=spaces)
        yield _tags(outputs.structural_tag, f"{name}.structural_tag")
        yield _json(self.guided_json, "guided_json")
        yield Structure("regex", self.guided_regex, "guided_regex")
        yield Structure("choice", self.guided_choice, "guided_choice")
        yield Structure("grammar", self.guided_grammar, "guided_grammar")
        yield Structure("regex", self.regex, "regex")
        yield Structure("grammar", self.ebnf, "ebnf")
        yield Structure("grammar", self.grammar, "grammar")
        yield _json(self.json_schema, "json_schema")

    @property
    def _response(self) -> Structure:
        param = "response_format"
        match self.response_format:
            case ObjectFormat(schema_=schema):
                return _json(schema if schema is not None else _OBJECT, param)
            case SchemaFormat(json_schema=named, schema_=bare):
                if named is None and bare is None:
                    raise InvalidRequest("a schema is missing", f"{param}.json_schema.json_schema")
                schema = named.schema_ if named is not None else bare
                strict = named is not None and bool(named.strict)
                return _json(schema if schema is not None else _OBJECT, param, strict=strict)
            case GrammarFormat(grammar=grammar):
                return Structure("grammar", grammar, param)
            case StructuralTagFormat() as tags:
                return tag_structure(tags, param)
        return Structure("json", None, param)


def _json(schema: Schema | None, param: str, strict: bool = False, spaces: bool = False) -> Structure:
    """JSON that follows a schema, without what cannot be followed unless all of it must be.

    Raises:
        InvalidRequest: it is a text that is no JSON.
    """
    read = _read(schema, param)
    if read is None or strict or _is_longer(schema, MAX_STRUCTURE_CHARACTERS):
        return Structure("json", schema, param)
    left, ignored = followed(read)
    if spaces and isinstance(left, dict):
        left = {GUIDANCE: {"whitespace_flexible": True}, **left}
    return Structure("json", left if ignored or spaces else schema, param, ignored)


def _compared(structure: Structure) -> tuple[str, Any]:
    """What is equal of two structures that ask for the same: some clients send one in several spellings."""
    read = _read(structure.source, structure.param) if structure.kind == "json" else structure.source
    return structure.kind, read


def _read(schema: Schema | None, param: str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"is no JSON: {error}", param) from error


def _tags(text: str | None, param: str) -> Structure:
    if text is None:
        return Structure("lark", None, param)
    try:
        tags = StructuralTagFormat.model_validate_json(text)
    except ValueError as error:
        raise InvalidRequest(f"is no structural tag: {error}", param) from error
    return tag_structure(tags, param)


def _is_longer(source: Any, most: int) -> bool:
    """Whether a structure has more than `most` characters, found out without writing it out."""
    left, pending = most, [source]
    while pending and left >= 0:
        match pending.pop():
            case str() as text:
                left -= len(text) + 2
            case dict() as members:
                left -= sum(len(name) + 4 for name in members) + 2
                pending += members.values()
            case list() as items:
                left -= 2 * len(items) + 2
                pending += items
            case number:
                left -= len(str(number))
    return left < 0
