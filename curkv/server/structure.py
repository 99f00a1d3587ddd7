"""Fields that give an output a form, in the words of OpenAI's API and of vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from curkv.engine.types import InvalidRequest, Structure
from curkv.server.limits import MAX_STRUCTURE_CHARACTERS, MAX_STRUCTURE_CHOICES

Expression = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STRUCTURE_CHARACTERS)]
Choices = Annotated[list[Expression], Field(fail_fast=True, min_length=1, max_length=MAX_STRUCTURE_CHOICES)]
Schema = dict[str, Any] | Expression
_STRICT = ConfigDict(strict=True, protected_namespaces=())


class PlainFormat(BaseModel):
    """Free text, or any JSON object."""

    model_config = _STRICT

    type: Literal["text", "json_object"]


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI's API wants it."""

    model_config = _STRICT

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Absent: any JSON object.")
    strict: bool | None = Field(None, description="Accepted; the schema is always followed.")


class SchemaFormat(BaseModel):
    """JSON that follows a schema."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(BaseModel):
    """Exactly one of these, as in vLLM."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    json_: Schema | None = Field(None, alias="json", description="JSON schema.")
    regex: Expression | None = Field(None, description="Expression that the whole output matches.")
    choice: Choices | None = Field(None, description="Texts of which the output is one.")


class StructureFields(BaseModel):
    """Fields of a request that give its output a form; at most one may be used."""

    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="Older form of structured_outputs.json.")
    guided_regex: Expression | None = Field(None, description="Older form of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="Older form of structured_outputs.choice.")

    @property
    def structure(self) -> Structure | None:
        """The form of the output, None if it is free.

        Raises:
            InvalidRequest: two were asked for, or one is too large.
        """
        outputs = self.structured_outputs or StructuredOutputs.model_construct()
        asked = [
            structure
            for structure in (
                Structure("json", self._response_schema, "response_format"),
                Structure("json", outputs.json_, "structured_outputs.json"),
                Structure("regex", outputs.regex, "structured_outputs.regex"),
                Structure("choice", outputs.choice, "structured_outputs.choice"),
                Structure("json", self.guided_json, "guided_json"),
                Structure("regex", self.guided_regex, "guided_regex"),
                Structure("choice", self.guided_choice, "guided_choice"),
            )
            if structure.source is not None
        ]
        if len(asked) > 1:
            raise InvalidRequest(f"cannot be had together with {asked[0].param}", asked[1].param)
        if asked and _is_longer(asked[0].source, MAX_STRUCTURE_CHARACTERS):
            raise InvalidRequest(f"is longer than {MAX_STRUCTURE_CHARACTERS} characters", asked[0].param)
        return asked[0] if asked else None

    @property
    def _response_schema(self) -> dict[str, Any] | None:
        match self.response_format:
            case PlainFormat(type="json_object"):
                return {"type": "object"}
            case SchemaFormat(json_schema=named):
                return named.schema_ if named.schema_ is not None else {"type": "object"}
        return None


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
