"""Bodies of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from curkv.server.protocol import MAX_LOGPROBS, FinishReason, GenerationFields, Text, Usage

MAX_MESSAGES = 4096
PART_SEPARATOR = "\n"
"""Between the text parts of a message, as in vLLM."""


class CacheControl(BaseModel):
    """Marks the end of the context, in the form that Anthropic's API gave it."""

    model_config = ConfigDict(strict=True)

    type: Literal["ephemeral"]


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = Field(None, description="The context ends behind this part.")


class Message(BaseModel):
    """One turn of a conversation.

    Attributes:
        name: handed to the chat template, which may ignore it.
    """

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]
    name: Text | None = None
    cache_control: CacheControl | None = Field(None, description="The context ends behind this message.")
    tool_calls: list[Any] | None = Field(None, description="Not supported: only an empty list is accepted.")

    @field_validator("content", mode="before")
    @classmethod
    def _say_what_is_understood(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("a message needs content: a string, or a list of text parts")
        if isinstance(value, list):
            kinds = [part.get("type") for part in value if isinstance(part, dict)]
            if unknown := [kind for kind in kinds if kind != "text"]:
                raise ValueError(f"only parts of type 'text' are understood, not {unknown[0]!r:.40}")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _refuse(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("tools are not supported")
        return value

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """Each part's text, and whether the context ends behind it."""
        if isinstance(self.content, str):
            return [(self.content, self.cache_control is not None)]
        parts = [(part.text, part.cache_control is not None) for part in self.content]
        if parts and self.cache_control is not None:
            parts[-1] = parts[-1][0], True
        return parts


class ChatRequest(GenerationFields):
    """A conversation to continue and how."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation, oldest message first.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="null: as many as the context has room for."
    )
    logprobs: bool | None = Field(False, description="Report the probability of each generated token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Likeliest alternatives of each; needs logprobs: true."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template.", examples=[{"enable_thinking": False}]
    )
    tool_choice: Any = Field(None, description="Only none and auto are accepted.")
    tools: list[Any] | None = Field(None, description="Not supported: refused unless tool_choice is none.")
    functions: list[Any] | None = Field(None, description="Not supported: only an empty list is accepted.")

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("is only allowed with logprobs: true")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _refuse_choice(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise ValueError("tools are not supported: only 'none' and 'auto' are accepted")
        return value

    @field_validator("tools", "functions")
    @classmethod
    def _refuse_tools(cls, value: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        if value and info.data.get("tool_choice") != "none":
            raise ValueError("tools are not supported")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives to report per token; None reports nothing."""
        return self.top_logprobs or 0 if self.logprobs else None


class TopLogprob(BaseModel):
    """A token that might have been chosen.

    Attributes:
        bytes: its text in UTF-8; null if it is a part of a character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """The token chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The assistant's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Delta(BaseModel):
    """What is new of a message; what is not new is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One event of a stream; it carries `usage` only if the stream was asked to include it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
