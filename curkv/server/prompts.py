"""A prompt as a text, as token ids or as a conversation: fields of endpoints that do not generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from curkv.engine.types import InvalidRequest
from curkv.server.chat.conversation import tokenize as tokenize_conversation
from curkv.server.chat.protocol import Message, Rendering
from curkv.server.limits import MAX_MESSAGES
from curkv.server.protocol import Int64, Text
from curkv.server.tokenizing import Reader

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class PromptFields(BaseModel):
    """A prompt; exactly one of `prompt` and `messages` is given."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    prompt: Text | Annotated[list[Int64], Field(fail_fast=True)] | None = Field(
        None, description="Text or token ids.", examples=["The capital of France is"]
    )
    messages: (
        Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None
    ) = Field(None, description="A conversation, written out by the chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )

    def token_ids(self, client: EngineClient, reader: Reader, add_special_tokens: bool = True) -> list[int]:
        """The prompt in tokens.

        Args:
            client: for its chat template.
            reader: tokenizes it.
            add_special_tokens: whether a text gets those that the tokenizer begins a text with.

        Raises:
            InvalidRequest: both forms were given or none, the chat template refuses the conversation, or it
                cannot fit into the context.
            APIError: 429, the queue has no room for so many tokens.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if self.messages is not None:
            rendering = Rendering(self.chat_template_kwargs or {})
            [prompt] = tokenize_conversation(self.messages, rendering, client, reader)
            return prompt.token_ids
        if isinstance(self.prompt, str):
            return reader.tokens(self.prompt, "prompt", add_special_tokens)
        return reader.count(self.prompt or [])
