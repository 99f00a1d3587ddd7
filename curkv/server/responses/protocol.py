"""Bodies of /v1/responses, as in OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from curkv.server.chat.protocol import (
    CacheControl,
    ChatRequest,
    EarlierCall,
    EarlierFunction,
    Message,
    TextPart,
)
from curkv.server.chat.tools import FunctionName
from curkv.server.dialects import DialectRequest, assistant, function_tool, named_tool, schema_format
from curkv.server.fields import RESPONSES, Undone
from curkv.server.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from curkv.server.protocol import KVUsage, Text

_STRICT = ConfigDict(strict=True)


class TextItem(BaseModel):
    """A part of a message or of a result; only text is understood."""

    model_config = _STRICT

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: Text = ""
    refusal: Text | None = None
    cache_control: CacheControl | None = Field(default=None, description="The context ends behind this part.")

    def part(self) -> TextPart:
        """The same as chat requests word it."""
        return TextPart(type="text", text=self.refusal or self.text, cache_control=self.cache_control)


Content = Text | Annotated[list[TextItem], Field(fail_fast=True)]


class MessageItem(BaseModel):
    """One turn of a conversation."""

    model_config = _STRICT

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None


class CallItem(BaseModel):
    """A call that the assistant made."""

    model_config = _STRICT

    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text
    id: str | None = None
    status: str | None = None


class ResultItem(BaseModel):
    """What a call gave."""

    model_config = _STRICT

    type: Literal["function_call_output"]
    call_id: Text
    output: Content
    id: str | None = None
    status: str | None = None


class ReasoningItem(BaseModel):
    """What the assistant thought."""

    model_config = _STRICT

    type: Literal["reasoning"]
    summary: list[TextItem] | None = None
    content: list[TextItem] | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: None = None


Item = MessageItem | CallItem | ResultItem | ReasoningItem
_KINDS = ("function_call", "function_call_output", "message", "reasoning")


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = _STRICT

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(BaseModel):
    """A function by its name."""

    model_config = _STRICT

    type: Literal["function"]
    name: FunctionName


class AllowedTools(BaseModel):
    """Those of the tools that may be called."""

    model_config = _STRICT

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class PlainFormat(BaseModel):
    """Free text, or any JSON object."""

    model_config = _STRICT

    type: Literal["text", "json_object"]


class SchemaFormat(BaseModel):
    """JSON that follows a schema."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(BaseModel):
    """Form of the answer."""

    model_config = _STRICT

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: str | None = Field(None, description="Accepted without effect.")


class Reasoning(BaseModel):
    """How much the model is to think."""

    model_config = _STRICT

    effort: str | None = Field(None, description="Handed to the chat template as `reasoning_effort`.")
    summary: str | None = Field(None, description="Accepted without effect: all of it is answered.")
    generate_summary: str | None = Field(None, description="Accepted without effect.")


class ResponsesStreamOptions(BaseModel):
    """Options of a stream."""

    model_config = _STRICT

    include_obfuscation: bool | None = Field(None, description="Accepted; events are never padded.")


class ResponsesRequest(DialectRequest):
    """A conversation to continue and how."""

    undone: ClassVar[Undone] = RESPONSES

    input: Text | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        examples=["What is the capital of France?"]
    )
    instructions: Text | None = Field(None, description="The system message; not inherited by later answers.")
    previous_response_id: str | None = Field(None, description="The conversation that this one goes on.")
    store: bool | None = Field(True, description="Keep the conversation, so that others may go on with it.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None,
        description="`message.output_text.logprobs` adds them to the text; reasoning is never encrypted.",
    )
    stream: bool | None = False
    stream_options: ResponsesStreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = Field(None, description="Given back as it came.")
    truncation: Literal["auto", "disabled"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _say_what_is_understood(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for item in value:
            if isinstance(item, dict) and (kind := item.get("type", "message")) not in _KINDS:
                raise ValueError(f"items of type {kind!r:.40} are not understood, only {', '.join(_KINDS)}")
        return value

    @field_validator("truncation")
    @classmethod
    def _refuse_truncation(cls, value: str | None) -> str | None:
        if value == "auto":
            raise ValueError("not supported: what is too long is refused; evict by `kv.budget` instead")
        return value

    def messages(self, earlier: list[Message]) -> list[Message]:
        """The conversation so far, without the instructions."""
        if isinstance(self.input, str):
            return [*earlier, Message(role="user", content=self.input)]
        return [*earlier, *as_messages(self.input)]

    @property
    def reports_logprobs(self) -> bool:
        """Whether the probabilities of the answer's tokens are wanted."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def chat(self, conversation: list[Message]) -> ChatRequest:
        """The same request as chat completions word it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        if self.instructions:
            conversation = [Message(role="system", content=self.instructions), *conversation]
        form = self.text.format if self.text else None
        effort = self.reasoning.effort if self.reasoning else None
        return self.translated(
            conversation,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            logprobs=self.reports_logprobs or None,
            top_logprobs=self.top_logprobs or None,
            tools=[function_tool(t.name, t.description, t.parameters, t.strict) for t in self.tools or ()]
            or None,
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(form),
            chat_template_kwargs={"reasoning_effort": effort} if effort is not None else None,
        )


def as_messages(items: list[Item]) -> list[Message]:
    """Items as messages: what the assistant thought, said and called in a row is one of them."""
    messages: list[Message] = []
    parts: list[TextPart] = []
    calls: list[EarlierCall] = []
    thoughts: list[str] = []

    def end_turn() -> None:
        if parts or calls or thoughts:
            messages.append(assistant(parts, calls, "\n".join(thoughts) or None))
            for pending in (parts, calls, thoughts):
                pending.clear()

    for item in items:
        match item:
            case MessageItem(role="assistant", content=content):
                if calls or parts:
                    end_turn()
                parts += _parts(content)
            case CallItem():
                function = EarlierFunction(name=item.name, arguments=item.arguments)
                calls.append(EarlierCall(id=item.call_id, function=function))
            case ReasoningItem():
                if calls or parts:
                    end_turn()
                thoughts += [part.text for part in (item.content or item.summary or ())]
            case ResultItem():
                end_turn()
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=_parts(item.output)))
            case MessageItem():
                end_turn()
                messages.append(Message(role=item.role, content=_parts(item.content)))
    end_turn()
    return messages


def _parts(content: str | list[TextItem]) -> list[TextPart]:
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    return [item.part() for item in content]


def _choice(choice: str | NamedFunction | AllowedTools | None) -> str | dict[str, Any] | None:
    if isinstance(choice, NamedFunction):
        return named_tool(choice.name)
    if isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [named_tool(tool.name) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _format(form: PlainFormat | SchemaFormat | None) -> dict[str, Any] | None:
    if isinstance(form, SchemaFormat):
        return schema_format(form.schema_, form.strict)
    return {"type": form.type} if form is not None else None


class OutputLogprob(BaseModel):
    """A token, and those that might have been chosen."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[OutputLogprob] = []


class OutputText(BaseModel):
    """Text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonValue] = []
    logprobs: list[OutputLogprob] = []


class ReasoningText(BaseModel):
    """Reasoning of the answer."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputMessage(BaseModel):
    """What the model said."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(BaseModel):
    """What the model called."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class OutputReasoning(BaseModel):
    """What the model thought."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[JsonValue] = []
    content: list[ReasoningText]
    status: Status


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """What the generated tokens were for; reasoning is not counted apart."""

    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    """Tokens of the request, and what became of their KV cache."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int
    kv: KVUsage | None = None


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """The whole answer, and what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: ResponseFailure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: JsonValue = None
    store: bool = True
    temperature: float | None = None
    text: JsonValue = None
    tool_choice: JsonValue = "auto"
    tools: list[JsonValue] = []
    top_p: float | None = None
    top_logprobs: int = 0
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    usage: ResponsesUsage | None = None


class DeletedResponse(BaseModel):
    """A response that is kept no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class StreamEvent(BaseModel):
    """One event of a stream; the fields beside these two are those of its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
