"""Bodies of POST /v1/messages, as in Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from curkv.engine.types import InvalidRequest
from curkv.server.chat.protocol import (
    CacheControl,
    ChatRequest,
    EarlierCall,
    EarlierFunction,
    Message,
    TextPart,
)
from curkv.server.chat.tools import FunctionName
from curkv.server.dialects import (
    DialectRequest,
    assistant,
    continues,
    function_tool,
    named_tool,
    schema_format,
)
from curkv.server.fields import MESSAGES, Undone
from curkv.server.limits import MAX_MESSAGES, MAX_TOOLS
from curkv.server.protocol import KVUsage, StopStrings, Text

_STRICT = ConfigDict(strict=True)


class ToolUseBlock(BaseModel):
    """A call that the assistant made."""

    model_config = _STRICT

    type: Literal["tool_use"]
    id: Text
    name: FunctionName
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(BaseModel):
    """What a call gave."""

    model_config = _STRICT

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | list[TextPart] | None = None
    is_error: bool | None = Field(False, description="The result is told to the model behind `Error: `.")
    cache_control: CacheControl | None = None


class ThinkingBlock(BaseModel):
    """What the assistant thought; the signature is not looked at."""

    model_config = _STRICT

    type: Literal["thinking"]
    thinking: Text
    signature: str | None = None


Block = Annotated[TextPart | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]
System = Text | list[TextPart]


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = _STRICT

    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Block], Field(fail_fast=True)]

    def messages(self) -> Iterator[Message]:
        """The same as OpenAI's API words it: results of calls are messages of their own."""
        if isinstance(self.content, str):
            yield Message(role=self.role, content=self.content)
            return
        parts = [block for block in self.content if isinstance(block, TextPart)]
        if self.role == "assistant":
            used = [block for block in self.content if isinstance(block, ToolUseBlock)]
            thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
            turn = assistant(parts, [_call(block) for block in used], "\n".join(thoughts) or None)
            yield turn.model_copy(update={"cache_control": next((b.cache_control for b in used[::-1]), None)})
            return
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                yield _result(block)
        if parts:
            yield Message(role="user", content=parts)


def _call(block: ToolUseBlock) -> EarlierCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return EarlierCall(id=block.id, function=EarlierFunction(name=block.name, arguments=arguments))


def _result(block: ToolResultBlock) -> Message:
    content = [TextPart(type="text", text=block.content)] if isinstance(block.content, str) else block.content
    parts = [TextPart(type="text", text="Error: ")] * bool(block.is_error) + (content or [])
    return Message(
        role="tool", tool_call_id=block.tool_use_id, content=parts, cache_control=block.cache_control
    )


class MessagesTool(BaseModel):
    """A function that the model may call."""

    model_config = _STRICT

    type: Literal["custom"] | None = Field("custom", description="Only tools of the client are known.")
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = Field(
        default=None, description="Accepted without effect: mark the system text or a message."
    )


class ToolChoice(BaseModel):
    """Whether tools may, must or must not be called."""

    model_config = _STRICT

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = False


class Thinking(BaseModel):
    """Whether the model is to think first; templates that know no `enable_thinking` do as they do."""

    model_config = _STRICT

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0, description="Accepted, not enforced.")


class OutputFormat(BaseModel):
    """JSON that follows a schema."""

    model_config = _STRICT

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """Form of the answer."""

    model_config = _STRICT

    format: OutputFormat | None = None
    effort: str | None = Field(None, description="Accepted without effect.")


class PromptOfMessages(DialectRequest):
    """What the prompt is made of."""

    undone: ClassVar[Undone] = MESSAGES

    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    system: System | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="Older form of output_config.format.")
    cache_control: CacheControl | None = Field(default=None, description="As on the last message.")

    def chat(self, **fields: Any) -> ChatRequest:
        """The same request as OpenAI's API words it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        messages = [message for turn in self.messages for message in turn.messages()]
        if self.system:
            messages.insert(0, Message(role="system", content=self.system))
        if self.cache_control is not None and messages:
            messages[-1] = messages[-1].model_copy(update={"cache_control": self.cache_control})
        choice = self.tool_choice or ToolChoice(type="auto")
        wanted = self.output_config.format if self.output_config else None
        form = wanted or self.output_format
        return self.translated(
            messages,
            tools=[function_tool(t.name, t.description, t.input_schema, t.strict) for t in self.tools or ()]
            or None,
            tool_choice=_choice(choice) if self.tool_choice else None,
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            response_format=schema_format(form.schema_) if form else None,
            chat_template_kwargs=_thinking(self.thinking) if self.thinking else None,
            continue_final_message=continues(messages),
            **fields,
        )


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("needs the name of a tool", "tool_choice.name")
        return named_tool(choice.name)
    return "required" if choice.type == "any" else choice.type


def _thinking(thinking: Thinking) -> dict[str, Any]:
    return {} if thinking.type == "adaptive" else {"enable_thinking": thinking.type == "enabled"}


class CountRequest(PromptOfMessages):
    """What to count."""


class CountResponse(BaseModel):
    """Tokens of the prompt."""

    input_tokens: int


class MessagesRequest(PromptOfMessages):
    """A conversation to continue and how."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: StopStrings | None = None
    stream: bool | None = False
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)

    @property
    def whole_chat(self) -> ChatRequest:
        """The same request as OpenAI's API words it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        return self.chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class TextContent(BaseModel):
    """Text of the answer."""

    type: Literal["text"] = "text"
    text: str


class ToolUseContent(BaseModel):
    """A call of the answer."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: Any


class ThinkingContent(BaseModel):
    """Reasoning of the answer."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


Content = TextContent | ToolUseContent | ThinkingContent
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(BaseModel):
    """Tokens of the request.

    Attributes:
        input_tokens: those that were computed.
        cache_read_input_tokens: those that were cached from an earlier prompt.
        kv: what became of their KV cache.
    """

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    kv: KVUsage | None = None


class MessagesResponse(BaseModel):
    """The whole answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class MessageStart(BaseModel):
    """A stream begins."""

    type: Literal["message_start"] = "message_start"
    message: MessagesResponse


class BlockStart(BaseModel):
    """A block begins."""

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Content


class TextDelta(BaseModel):
    """A piece of text."""

    type: Literal["text_delta"] = "text_delta"
    text: str


class InputDelta(BaseModel):
    """A piece of a call's arguments."""

    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class ThinkingDelta(BaseModel):
    """A piece of reasoning."""

    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class BlockDelta(BaseModel):
    """A block goes on."""

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextDelta | InputDelta | ThinkingDelta


class BlockStop(BaseModel):
    """A block ends."""

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class Ending(BaseModel):
    """Why an answer ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """How the answer ended, and its usage."""

    type: Literal["message_delta"] = "message_delta"
    delta: Ending
    usage: MessagesUsage


class MessageStop(BaseModel):
    """A stream ends."""

    type: Literal["message_stop"] = "message_stop"
