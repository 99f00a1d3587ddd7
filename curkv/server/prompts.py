"""A prompt as a text, as token ids or as a conversation: fields of endpoints that do not generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field

from curkv.engine.types import InvalidRequest
from curkv.server.chat.conversation import tokenize as tokenize_conversation
from curkv.server.chat.protocol import ChatRequest, ConversationFields, Messages
from curkv.server.fields import GENERATION, Refused, Undone
from curkv.server.generation import Prompt
from curkv.server.protocol import Int64, Text
from curkv.server.tokenizing import Reader

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

_ANSWER = "it is about the answer; what chat completions take can be sent as it is"

PROMPTS = Undone(
    refused={
        "chat_template": GENERATION.refused["chat_template"],
        "truncate_prompt_tokens": Refused("the prompt is read whole"),
    },
    harmless={
        **GENERATION.harmless,
        **dict.fromkeys(ChatRequest.model_fields.keys() - {"truncate_prompt_tokens"}, _ANSWER),
    },
)
"""Of /tokenize and /v1/kv/explain."""


class PromptFields(ConversationFields):
    """A prompt; exactly one of `prompt` and `messages` is given."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    prompt: Text | Annotated[list[Int64], Field(fail_fast=True)] | None = Field(
        None, description="Text or token ids.", examples=["The capital of France is"]
    )
    messages: Messages | None = Field(
        None, description="A conversation, written out as chat completions do with the same fields."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokens are added that the tokenizer begins a text with; absent: to a text, "
        "not to a conversation.",
    )

    def read(self, client: EngineClient, reader: Reader) -> Prompt:
        """The prompt in tokens.

        Args:
            client: for its chat template.
            reader: tokenizes it.

        Raises:
            InvalidRequest: both forms were given or none, a field is not known, the chat template refuses the
                conversation, or it cannot fit into the context.
            APIError: 429, the queue has no room for so many tokens.
        """
        PROMPTS.check(self.model_extra or {}, type(self).model_fields)
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if self.messages is not None:
            [prompt] = tokenize_conversation(self.messages, self.rendering(self.tool_use), client, reader)
            return prompt
        if isinstance(self.prompt, str):
            return Prompt(reader.tokens(self.prompt, "prompt", self.add_special_tokens is not False))
        return Prompt(reader.count(self.prompt or []))
