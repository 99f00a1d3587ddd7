"""Bodies of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, field_validator

from curkv.server.protocol import MAX_LOGPROBS, FinishReason, GenerationFields, Usage

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


def _check_prompt(value: Any) -> Any:
    """Accepts one of the four forms of a prompt; messages of a plain union would list all four."""
    if value in ("", []):
        raise ValueError("the prompt is empty")
    if isinstance(value, str) or _is_list_of(int, value):
        prompts = [value]
    elif _is_list_of(str, value) or (_is_list_of(list, value) and all(_is_list_of(int, p) for p in value)):
        prompts = value
    else:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts in one request, at most {MAX_PROMPTS} are allowed")
    for prompt in prompts:
        if not prompt:
            raise ValueError("one of the prompts is empty")
        if isinstance(prompt, str) and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError("the text contains a lone surrogate, which is no character")
    return value


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(GenerationFields):
    """What to complete and how."""

    prompt: Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=Prompt)] = Field(
        description="Text or token ids, one or several prompts.", examples=["The capital of France is"]
    )
    max_tokens: int | None = Field(
        DEFAULT_MAX_TOKENS, ge=1, lt=2**31, description="null: as many as the context has room for."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report generated tokens with so many alternatives each."
    )
    echo: bool | None = Field(False, description="Prompt in the answer: true is refused, not supported yet.")
    suffix: str | None = Field(None, description="Not supported: any text is refused.")
    best_of: int | None = Field(None, description="Not supported: only a value equal to n is accepted.")

    @field_validator("echo", "suffix")
    @classmethod
    def _refuse(cls, value: bool | str | None) -> bool | str | None:
        if value:
            raise ValueError("not supported yet")
        return value

    @field_validator("best_of")
    @classmethod
    def _refuse_other_than_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise ValueError("not supported unless it equals n")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _at_least_min_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("min_tokens", 0):
            raise ValueError("is smaller than min_tokens")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Logprobs(BaseModel):
    """Log-probabilities of a choice's tokens, one entry per token in each list.

    Attributes:
        tokens: each token's text.
        token_logprobs: natural logarithm of each token's probability.
        top_logprobs: text to log-probability of each position's likeliest tokens; null if not asked for.
        text_offset: where each token's text begins, in characters of the generated text.
    """

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = []

    def extend(self, more: Logprobs) -> None:
        """Appends the entries of further tokens."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.text_offset += more.text_offset
        if self.top_logprobs is not None:
            self.top_logprobs += more.top_logprobs or []


class CompletionChoice(BaseModel):
    """One continuation, or, in a stream, what is new of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def has_news(self) -> bool:
        """Whether a client learns anything from this piece."""
        return bool(self.text or self.finish_reason or self.token_ids or self.logprobs)

    def extend(self, piece: CompletionChoice) -> None:
        """Adds the next piece of the same choice."""
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.stop_reason = piece.stop_reason
        self.prompt_token_ids = self.prompt_token_ids or piece.prompt_token_ids
        if piece.token_ids is not None:
            self.token_ids = (self.token_ids or []) + piece.token_ids
        if piece.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = piece.logprobs
            else:
                self.logprobs.extend(piece.logprobs)


class CompletionResponse(BaseModel):
    """The answer, or one chunk of it; chunks carry `usage` only if the stream was asked to include it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
