"""Bodies of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

from curkv.engine.types import InvalidRequest
from curkv.server.chat.tools import (
    CalledFunction,
    Choice,
    FunctionDelta,
    FunctionName,
    FunctionSpec,
    NamedFunction,
    NamedTool,
    ToolCall,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
)
from curkv.server.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from curkv.server.logprobs import PromptLogprobs
from curkv.server.protocol import Chunk, GenerationFields, Sparse, Text, Usage

PART_SEPARATOR = "\n"
"""What stands between the text parts of a message, as in vLLM."""

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class CacheControl(BaseModel):
    """Marks the end of the context, in the form that Anthropic's API gave it."""

    model_config = ConfigDict(strict=True)

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = Field(
        None, description="For so long what is cached of the context gives way after all else."
    )


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = Field(default=None, description="The context ends behind this part.")


class EarlierFunction(BaseModel):
    """A function that the assistant called."""

    model_config = ConfigDict(strict=True)

    name: FunctionName
    arguments: Text | None = Field(None, description="JSON object as text, as the model gave it.")


class EarlierCall(BaseModel):
    """A call in an earlier message of the assistant."""

    model_config = ConfigDict(strict=True)

    id: Text | None = None
    type: Literal["function"] = "function"
    function: EarlierFunction


class Message(BaseModel):
    """One turn of a conversation.

    Attributes:
        name: handed to the chat template, which may ignore it.
        content: null only where the assistant called tools.
        tool_calls: what the assistant called.
        tool_call_id: which call a message of role `tool` answers.
        function_call: older form of `tool_calls`.
        reasoning_content: what the assistant thought, handed to the chat template.
    """

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    tool_calls: Annotated[list[EarlierCall], Field(max_length=MAX_TOOLS)] | None = None
    function_call: EarlierFunction | None = None
    content: Annotated[
        Text | Annotated[list[TextPart], Field(fail_fast=True)] | None, Field(validate_default=True)
    ] = None
    name: Text | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    cache_control: CacheControl | None = Field(
        default=None, description="The context ends behind this message."
    )

    @field_validator("content", mode="before")
    @classmethod
    def _say_what_is_understood(cls, value: Any, info: ValidationInfo) -> Any:
        calls = info.data.get("tool_calls") or info.data.get("function_call")
        if value is None and not (calls and info.data.get("role") == "assistant"):
            raise ValueError("a message needs content: a string, or a list of text parts")
        if isinstance(value, list):
            kinds = [part.get("type") for part in value if isinstance(part, dict)]
            if unknown := [kind for kind in kinds if kind != "text"]:
                raise ValueError(f"only parts of type 'text' are understood, not {unknown[0]!r:.40}")
        return value

    @property
    def called(self) -> list[EarlierCall]:
        """What the assistant called in this message."""
        older = [EarlierCall(function=self.function_call)] if self.function_call is not None else []
        return [*(self.tool_calls or ()), *older]

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """Each part's text, and whether the context ends behind it."""
        if self.content is None or isinstance(self.content, str):
            return [(self.content or "", self.cache_control is not None)]
        parts = [(part.text, part.cache_control is not None) for part in self.content]
        if parts and self.cache_control is not None:
            parts[-1] = parts[-1][0], True
        return parts


def context_ttl(messages: Sequence[Message]) -> float:
    """Seconds for which what is cached of the context gives way after all else: the longest asked for."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    marks = [part.cache_control for part in parts] + [message.cache_control for message in messages]
    return max((_TTL_SECONDS.get(mark.ttl or "", 0.0) for mark in marks if mark is not None), default=0.0)


_TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}


@dataclass(frozen=True)
class Rendering:
    """How a conversation is written out.

    Attributes:
        variables: of the chat template.
        tools: which it tells of, in OpenAI's form.
        documents: which it tells of.
        generation_prompt: the assistant's message begins at the end.
        continues: the text ends with the content of the last message.
        special_tokens: the tokens that the tokenizer begins a text with are added.
        reads_special_tokens: text of special tokens in messages of users and tools is read as such.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    generation_prompt: bool = True
    continues: bool = False
    special_tokens: bool = False
    reads_special_tokens: bool = False


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ConversationFields(BaseModel):
    """How a conversation is written out as a prompt, tools included."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template.", examples=[{"enable_thinking": False}]
    )
    reasoning_effort: str | None = Field(
        None, description="A variable of the chat template; `none` sets `enable_thinking` to false."
    )
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = Field(
        None, description="What the answer may rest upon, for chat templates that know them."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Begin the assistant's message; true unless continue_final_message."
    )
    continue_final_message: bool | None = Field(False, description="Go on with the last message.")
    add_special_tokens: bool | None = Field(
        False, description="Add the tokens that the tokenizer begins a text with; templates do so themselves."
    )
    read_special_tokens: bool | None = Field(
        False, description="Text of special tokens in messages of users and tools is read as such."
    )
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Choice | None = Field(
        None, description="Whether it may (auto), must (required, or one by name) or must not (none) call."
    )
    parallel_tool_calls: bool | None = Field(True, description="Several calls in one answer.")
    functions: Annotated[list[FunctionSpec], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Older form of tools."
    )
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(
        None, description="Older form of tool_choice."
    )

    @property
    def tool_use(self) -> ToolUse:
        """What may be called.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        if not self.functions:
            return ToolUse.of(self.tools or (), self.tool_choice, self.parallel_tool_calls is not False)
        if self.tools:
            raise InvalidRequest("cannot be had together with tools", "functions")
        choice: Choice | None
        if isinstance(self.function_call, NamedFunction):
            choice = NamedTool(type="function", function=self.function_call)
        else:
            choice = self.function_call
        specs = [ToolSpec(type="function", function=function) for function in self.functions]
        return ToolUse.of(specs, choice, parallel=False, legacy=True)

    def rendering(self, tools: ToolUse) -> Rendering:
        """How the conversation is written out.

        Args:
            tools: `tool_use`.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        if self.continue_final_message and self.add_generation_prompt:
            other = "add_generation_prompt"
            raise InvalidRequest(f"cannot be had together with {other}", "continue_final_message")
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                variables.setdefault("enable_thinking", False)
        return Rendering(
            variables=variables,
            tools=tuple(tools.told),
            documents=tuple(self.documents or ()),
            generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            continues=bool(self.continue_final_message),
            special_tokens=bool(self.add_special_tokens),
            reads_special_tokens=bool(self.read_special_tokens),
        )


class ChatRequest(GenerationFields, ConversationFields):
    """A conversation to continue and how."""

    messages: Messages = Field(
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

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("is only allowed with logprobs: true")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate."""
        return self.max_completion_tokens or self.max_tokens or self.predicted.get("max_tokens")

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives to report per token; None reports nothing."""
        return self.top_logprobs or 0 if self.logprobs else None


class TopLogprob(BaseModel):
    """A token that might have been chosen.

    Attributes:
        bytes: its text in UTF-8, of which a character may take the bytes of several tokens.
    """

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The token chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The assistant's answer; calls and reasoning are left out where there are none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("reasoning_content", "tool_calls", "function_call")
        return {k: v for k, v in handler(self).items() if v is not None or k not in optional}


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
    prompt_logprobs: PromptLogprobs | None = None


class Delta(Sparse):
    """What is new of a message; what is not new is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(Chunk):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
