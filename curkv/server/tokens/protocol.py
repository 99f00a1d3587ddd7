"""Bodies of POST /tokenize and POST /detokenize, as in vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from curkv.server.prompts import PromptFields
from curkv.server.protocol import Int64


class TokenizeRequest(PromptFields):
    """What to tokenize."""

    return_token_strs: bool | None = Field(
        False, description="Add each token's name in the vocabulary; null for one that has none."
    )


class TokenizeResponse(BaseModel):
    """Tokens of a prompt.

    Attributes:
        max_model_len: most tokens of prompt and output together.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class DetokenizeRequest(BaseModel):
    """What to turn into text."""

    model_config = ConfigDict(strict=True)

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    tokens: Annotated[list[Int64], Field(fail_fast=True)] = Field(examples=[[504, 3575]])


class DetokenizeResponse(BaseModel):
    """Text of the tokens, special ones included."""

    prompt: str
