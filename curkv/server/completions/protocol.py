"""Bodies of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, field_validator

from curkv.server.limits import MAX_LOGPROBS, MAX_PROMPTS
from curkv.server.logprobs import PromptLogprobs
from curkv.server.protocol import Chunk, FinishReason, GenerationFields, check_text

DEFAULT_MAX_TOKENS = 16


def check_prompt(value: Any) -> Any:
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
        if isinstance(prompt, str):
            check_text(prompt)
    return value


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {kind}


Prompt = str | list[str] | list[int] | list[list[int]]


def prompts_of(prompt: Any) -> list[str] | list[list[int]]:
    """A prompt in any of the four forms as a list of prompts."""
    prompts: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return prompts


class CompletionRequest(GenerationFields):
    """What to complete and how."""

    prompt: Annotated[Prompt, PlainValidator(check_prompt, json_schema_input_type=Prompt)] = Field(
        description="Text or token ids, one or several prompts.", examples=["The capital of France is"]
    )
    echo: bool | None = Field(False, description="Begin each choice, and its logprobs, with the prompt.")
    max_tokens: int | None = Field(
        DEFAULT_MAX_TOKENS,
        ge=0,
        lt=2**31,
        description="null: as many as the context has room for. 0: none, only with echo.",
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report the tokens with so many alternatives each."
    )
    add_special_tokens: bool | None = Field(
        True, description="Texts get the tokens that the tokenizer begins a text with."
    )
    best_of: int | None = Field(None, description="Only a value equal to n is accepted.")

    @field_validator("best_of")
    @classmethod
    def _refuse_other_than_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise ValueError("not supported unless it equals n")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _at_least_min_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < (info.data.get("min_tokens") or 0):
            raise ValueError("is smaller than min_tokens")
        if value == 0 and not info.data.get("echo"):
            raise ValueError("0 tokens are an answer only with echo: true")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        return prompts_of(self.prompt)


class Logprobs(BaseModel):
    """Log-probabilities of a choice's tokens, one entry per token in each list; null for a prompt's first.

    Attributes:
        tokens: each token's text.
        token_logprobs: natural logarithm of each token's probability.
        top_logprobs: text to log-probability of each position's likeliest tokens; null if not asked for.
        text_offset: where each token's text begins, in characters of the choice's text.
    """

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
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
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def has_news(self) -> bool:
        """Whether a client learns anything from this piece."""
        told = self.token_ids or self.logprobs or self.prompt_logprobs
        return bool(self.text or self.finish_reason or told)

    def extend(self, piece: CompletionChoice) -> None:
        """Adds the next piece of the same choice."""
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.stop_reason = piece.stop_reason
        self.prompt_token_ids = self.prompt_token_ids or piece.prompt_token_ids
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        if piece.token_ids is not None:
            self.token_ids = (self.token_ids or []) + piece.token_ids
        if piece.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = piece.logprobs
            else:
                self.logprobs.extend(piece.logprobs)


class CompletionResponse(Chunk):
    """The answer, or one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
