"""Bodies of Ollama's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from curkv.engine.types import InvalidRequest
from curkv.server.chat.protocol import (
    ChatLogprob,
    ChatRequest,
    EarlierCall,
    EarlierFunction,
    Message,
    TextPart,
)
from curkv.server.chat.tools import FunctionName, ToolSpec
from curkv.server.dialects import DialectRequest, assistant, continues, schema_format
from curkv.server.embeddings.protocol import EmbeddingFields
from curkv.server.fields import OLLAMA, OLLAMA_OPTIONS, Undone
from curkv.server.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from curkv.server.protocol import Int64, KVUsage, Sparse, StopString, StopStrings, Text

_STRICT = ConfigDict(strict=True)
_FOREVER = (-1, -2)
"""Values of `num_predict` that ask for as many tokens as there is room for."""


class OllamaFunction(BaseModel):
    """A function and its arguments."""

    model_config = _STRICT

    name: FunctionName
    arguments: dict[str, Any] = {}


class OllamaCall(BaseModel):
    """A call that the assistant made."""

    model_config = _STRICT

    id: str | None = None
    function: OllamaFunction


class OllamaTurn(BaseModel):
    """One turn of a conversation."""

    model_config = _STRICT

    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    thinking: Text | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: Text | None = None
    tool_call_id: Text | None = None
    images: list[str] | None = None

    @field_validator("images")
    @classmethod
    def _refuse_images(cls, value: list[str] | None) -> list[str] | None:
        if value:
            raise ValueError("images are not understood, only text")
        return value

    def message(self) -> Message:
        """The same as OpenAI's API words it."""
        if self.role == "assistant":
            parts = [TextPart(type="text", text=self.content)] if self.content else []
            return assistant(parts, [_call(call) for call in self.tool_calls or ()], self.thinking)
        return Message(
            role=self.role, content=self.content, name=self.tool_name, tool_call_id=self.tool_call_id
        )


def _call(call: OllamaCall) -> EarlierCall:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return EarlierCall(id=call.id, function=EarlierFunction(name=call.function.name, arguments=arguments))


class OllamaOptions(BaseModel):
    """How to choose tokens and when to end."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Int64 | None = None
    num_predict: int | None = Field(None, ge=-2, lt=2**31, description="-1, -2: all there is room for.")
    stop: StopString | StopStrings | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    def translated(self) -> dict[str, Any]:
        """The same as OpenAI's API and vLLM's word it.

        Raises:
            InvalidRequest: an option is not known, or asks for what is not done.
        """
        OLLAMA_OPTIONS.check(self.model_extra or {}, OllamaOptions.model_fields, "options.")
        given = self.model_dump(exclude_none=True, include=set(OllamaOptions.model_fields))
        if "repeat_penalty" in given:
            given["repetition_penalty"] = given.pop("repeat_penalty")
        if (most := given.pop("num_predict", None)) is not None and most not in _FOREVER:
            if most == 0:
                raise InvalidRequest("at least one token is generated", "options.num_predict")
            given["max_tokens"] = most
        return given


class OllamaRequest(DialectRequest):
    """Fields of both endpoints that generate."""

    undone: ClassVar[Undone] = OLLAMA

    format: Literal["json", ""] | dict[str, Any] | None = Field(None, description="`json`, or a JSON schema.")
    options: OllamaOptions | None = None
    stream: bool | None = True
    think: bool | Literal["low", "medium", "high", "max"] | None = Field(
        None, description="Handed to the chat template as `enable_thinking`, or `reasoning_effort`."
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def chat(self, messages: list[Message], **fields: Any) -> ChatRequest:
        """The same request as OpenAI's API words it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        options = self.options.translated() if self.options else {}
        return self.translated(
            messages,
            stream=self.stream is not False,
            response_format=_format(self.format),
            chat_template_kwargs=_thinking(self.think),
            logprobs=self.logprobs or None,
            top_logprobs=self.top_logprobs or None,
            continue_final_message=continues(messages),
            **options,
            **fields,
        )


def _format(wanted: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(wanted, dict):
        return schema_format(wanted)
    return {"type": "json_object"} if wanted == "json" else None


def _thinking(think: bool | str | None) -> dict[str, Any] | None:
    if think is None:
        return None
    return {"enable_thinking": think} if isinstance(think, bool) else {"reasoning_effort": think}


class OllamaChatRequest(OllamaRequest):
    """A conversation to continue and how; none only asks whether the model is there."""

    messages: Annotated[list[OllamaTurn], Field(fail_fast=True, max_length=MAX_MESSAGES)] = Field(
        [], examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None

    @property
    def whole_chat(self) -> ChatRequest:
        """The same request as OpenAI's API words it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        return self.chat([turn.message() for turn in self.messages], tools=self.tools or None)


class GenerateRequest(OllamaRequest):
    """A prompt to answer and how; an empty one only asks whether the model is there."""

    prompt: Text = Field("", examples=["What is the capital of France?"])
    system: Text | None = None
    raw: bool | None = Field(False, description="Continue the prompt as it is, without the chat template.")
    images: list[str] | None = None
    suffix: Text | None = None

    @field_validator("images", "suffix")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported: the models served read text and continue it")
        return value

    @property
    def whole_chat(self) -> ChatRequest:
        """The same request as OpenAI's API words it.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        system = [Message(role="system", content=self.system)] if self.system else []
        return self.chat([*system, Message(role="user", content=self.prompt)])


class AnsweredCall(BaseModel):
    """A call of the answer."""

    id: str
    function: OllamaFunction


class OllamaMessage(Sparse):
    """A message, or what is new of it."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class OllamaResponse(Sparse):
    """An answer, or a piece of it; counts and durations, in nanoseconds, come with its end."""

    model: str
    created_at: str
    message: OllamaMessage | None = None
    response: str | None = None
    thinking: str | None = None
    logprobs: list[ChatLogprob] | None = None
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    kv: KVUsage | None = None


class EmbedRequest(EmbeddingFields):
    """What to embed, as Ollama has it."""

    input: Text | list[Text] = Field(examples=["The tide turned."])
    truncate: bool | None = Field(True, description="Read only what the context has room for.")
    options: dict[str, Any] | None = Field(None, description="Accepted without effect: nothing is sampled.")


class EmbedResponse(BaseModel):
    """The vectors, in the order of the texts."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int


class OlderEmbedRequest(EmbeddingFields):
    """What to embed, as Ollama had it."""

    prompt: Text
    options: dict[str, Any] | None = Field(None, description="Accepted without effect: nothing is sampled.")


class OlderEmbedResponse(BaseModel):
    """The vector."""

    embedding: list[float]


class ModelDetails(BaseModel):
    """What kind of model it is."""

    parent_model: str = ""
    format: str = "curkv"
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str


class TaggedModel(BaseModel):
    """A model that can be named in requests."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str = ""
    details: ModelDetails


class Tags(BaseModel):
    """All models of this server: one, under each of its names."""

    models: list[TaggedModel]


class ShowRequest(BaseModel):
    """Which model to describe."""

    model: str | None = None
    name: str | None = Field(None, description="Older form of model.")
    verbose: bool | None = False


class Shown(BaseModel):
    """What there is to know of a model."""

    modelfile: str = ""
    parameters: str = ""
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(BaseModel):
    """Version of the API that is spoken, which clients ask for before they use what is new in it."""

    version: str
