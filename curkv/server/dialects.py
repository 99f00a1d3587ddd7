"""What the APIs of others have in common here: each is translated into a chat request and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curkv.engine.types import InvalidRequest, Output
from curkv.server.blocks import Block, Blocks, Change
from curkv.server.chat.conversation import Conversation
from curkv.server.chat.protocol import ChatRequest, EarlierCall, Message, TextPart
from curkv.server.errors import as_api_error
from curkv.server.fields import Undone
from curkv.server.generation import Answer
from curkv.server.headers import KVFields
from curkv.server.protocol import Text


class DialectRequest(BaseModel):
    """Fields that every dialect has besides its own.

    Attributes:
        undone: fields that it is asked for and does not do.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    undone: ClassVar[Undone]

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    kv: KVFields | None = Field(None, description="Eviction controls; X-KV-* headers win over them.")
    priority: int | None = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")
    cache_salt: Text | None = Field(
        None, description="Prompts share what is held of them only with those of the same salt."
    )

    def translated(self, messages: Sequence[Message], **fields: Any) -> ChatRequest:
        """The same request as OpenAI's API words it; fields that are None are left out.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        self.undone.check(self.model_extra or {}, type(self).model_fields)
        shared = {name: getattr(self, name) for name in DialectRequest.model_fields}
        given = {name: value for name, value in (shared | fields).items() if value is not None}
        try:
            return ChatRequest.model_validate({"messages": list(messages), **given})
        except ValidationError as error:
            problem = as_api_error(error).body.error
            raise InvalidRequest(problem.message, problem.param) from error


def assistant(
    parts: Sequence[TextPart], calls: Sequence[EarlierCall], reasoning: str | None = None
) -> Message:
    """An earlier turn of the assistant."""
    return Message(
        role="assistant",
        content=list(parts) if parts or not calls else None,
        tool_calls=list(calls) or None,
        reasoning_content=reasoning,
    )


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """A function that the model may call, in the form of chat completions."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict or None}
    return {"type": "function", "function": {k: value for k, value in function.items() if value is not None}}


def named_tool(name: str) -> dict[str, Any]:
    """A function by its name, likewise."""
    return {"type": "function", "function": {"name": name}}


def schema_format(schema: dict[str, Any], strict: bool | None = None) -> dict[str, Any]:
    """JSON that follows a schema, likewise."""
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": strict}}


def continues(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer, as Anthropic and Ollama take it."""
    return bool(messages) and messages[-1].role == "assistant" and not messages[-1].called


class BlockAnswer(Answer):
    """An answer of one choice that is worded as a row of blocks."""

    def __init__(self, conversation: Conversation):
        super().__init__(conversation.generation)
        self._spoken = conversation.spoken()
        self._blocks = Blocks()
        self._last: Output | None = None

    @property
    def blocks(self) -> list[Block]:
        """Its blocks so far."""
        return self._blocks.blocks

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return any(block.kind == "call" for block in self.blocks)

    def streamed(self, choice: int, output: Output) -> str:
        """See `Answer`."""
        begin = "" if self._last is not None else self.beginning()
        return begin + self.worded(self._take(output), output)

    def add(self, choice: int, output: Output) -> None:
        """See `Answer`."""
        self._take(output)

    def _take(self, output: Output) -> list[Change]:
        self._last = output
        last = output.finish_reason is not None
        return self._blocks.take(self._spoken.take(output.text, last), last)

    @property
    def last(self) -> Output:
        """The newest output."""
        assert self._last is not None
        return self._last

    def beginning(self) -> str:
        """The beginning of a stream."""
        return ""

    @abstractmethod
    def worded(self, changes: Sequence[Change], output: Output) -> str:
        """What a stream says of an output and what it changed."""
