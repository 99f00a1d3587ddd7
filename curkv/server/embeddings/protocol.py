"""Bodies of POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from curkv.server.completions.protocol import Prompt, check_prompt, prompts_of
from curkv.server.fields import EMBEDDINGS

Input = Annotated[Prompt, PlainValidator(check_prompt, json_schema_input_type=Prompt)]


class EmbeddingFields(BaseModel):
    """Fields of this body and of Ollama's; others are kept aside, see `check_others`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**31, description="Read only so many last tokens of a text; -1: the context."
    )
    priority: int | None = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")

    def check_others(self) -> None:
        """Checks the fields that are not done.

        Raises:
            InvalidRequest: one asks for something.
        """
        EMBEDDINGS.check(self.model_extra or {}, type(self).model_fields)


class EmbeddingRequest(EmbeddingFields):
    """What to embed."""

    input: Input = Field(description="Text or token ids, one or several.", examples=["The tide turned."])
    encoding_format: Literal["float", "base64"] | None = "float"

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """What to embed, always as a list."""
        return prompts_of(self.input)


class Embedding(BaseModel):
    """The vector of one text.

    Attributes:
        embedding: of length 1; as base64, of little-endian float32.
    """

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
