"""Request fields and response parts that every generating endpoint shares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from curkv.engine.types import KVReport, SamplingParams
from curkv.models.vocabulary import Vocabulary
from curkv.server.fields import GENERATION
from curkv.server.headers import KVFields
from curkv.server.limits import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TOKEN_IDS,
)
from curkv.server.structure import StructureFields

FinishReason = Literal["stop", "length"]


def check_text(value: str) -> str:
    """Returns a text that can be encoded.

    Raises:
        ValueError: it has half a character.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text contains a lone surrogate, which is no character") from error
    return value


Text = Annotated[str, AfterValidator(check_text)]
"""Text that can be encoded: JSON may smuggle in half a character."""


class Sparse(BaseModel):
    """What is None is left out of the JSON, as clients expect who tell what is new by what is there."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
TokenIdKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


def _check_entries(value: Any) -> Any:
    """Counts before each entry is looked at, which would find as many errors."""
    if isinstance(value, dict) and len(value) > MAX_TOKEN_IDS:
        raise ValueError(f"has {len(value)} entries, at most {MAX_TOKEN_IDS} are allowed")
    return value


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="Send a last chunk with `usage` and no choices.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk says the usage so far."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


class GenerationFields(StructureFields):
    """Sampling, streaming and eviction fields; others are kept aside, see `check_others`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens.")
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: Int64 | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[Int64], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(0, ge=0, lt=2**31)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, gt=0, le=100)
    logit_bias: (
        Annotated[
            dict[TokenIdKey, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(_check_entries),
        ]
        | None
    ) = Field(None, description="Token id (as text) to what is added to its logit.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    repeat_penalty: float | None = Field(
        None, gt=0, le=100, description="llama.cpp's name of repetition_penalty."
    )
    n_predict: int | None = Field(
        None, ge=-1, lt=2**31, description="llama.cpp's name of max_tokens; -1: all there is room for."
    )
    include_stop_str_in_output: bool | None = Field(
        False, description="The stop string or token that ended the answer is part of it."
    )
    no_stop_trim: bool | None = Field(False, description="SGLang's name of include_stop_str_in_output.")
    skip_special_tokens: bool | None = Field(True, description="Special tokens have no text in the answer.")
    allowed_token_ids: (
        Annotated[list[Int64], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)] | None
    ) = Field(None, description="The only tokens that may be chosen.")
    bad_words: Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS)] | None = Field(
        None, description="Texts whose tokens never follow each other in the answer."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report the prompt's tokens with so many alternatives each."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**31, description="Read only so many last tokens of a prompt; -1: the context."
    )
    return_token_ids: bool | None = Field(
        False, description="Add `token_ids` and `prompt_token_ids` to choices."
    )
    priority: int | None = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")
    kv: KVFields | None = Field(None, description="Eviction controls; X-KV-* headers win over them.")
    cache_salt: Text | None = Field(
        None, description="Prompts share what is held of them only with those of the same salt."
    )
    user: str | None = Field(None, description="Accepted and not used.")

    @field_validator("stream_options")
    @classmethod
    def _only_in_streams(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("is only allowed with stream: true")
        return value

    def check_others(self) -> None:
        """Checks the fields that are not done.

        Raises:
            InvalidRequest: one asks for something.
        """
        GENERATION.check(self.model_extra or {}, type(self).model_fields)

    @property
    def predicted(self) -> dict[str, int | None]:
        """`n_predict` as the `max_tokens` that it asks for; nothing if it is not given."""
        if self.n_predict is None:
            return {}
        return {"max_tokens": self.n_predict if self.n_predict >= 0 else None}

    @property
    def choices_per_prompt(self) -> int:
        """`n`, with its default."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        """Whether its other chunks tell it too."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(
        self, max_tokens: int | None, logprobs: int | None, vocabulary: Vocabulary
    ) -> SamplingParams:
        """The engine's form; null means the default, as in OpenAI's API.

        Args:
            max_tokens: most tokens to generate.
            logprobs: alternatives to report per token.
            vocabulary: makes tokens of bad words.

        Raises:
            InvalidRequest: fields contradict each other.
        """
        given: dict[str, Any] = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
            if (value := getattr(self, name)) is not None
        }
        if self.repeat_penalty is not None:
            given["repetition_penalty"] = self.repeat_penalty
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        allowed = self.allowed_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            n=self.choices_per_prompt,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            structure=self.structure,
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            allowed_token_ids=tuple(allowed) if allowed is not None else None,
            bad_words=_spelt(self.bad_words or (), vocabulary),
            **given,
        )


def _spelt(words: Sequence[str], vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word as it begins a text and as it follows a blank, as in vLLM."""
    spelt = (vocabulary.encode(f"{blank}{word}", False) for word in words for blank in ("", " "))
    return tuple(dict.fromkeys(tuple(ids) for ids in spelt if ids))


class KVUsage(BaseModel):
    """What eviction really did to the request.

    Attributes:
        policy: name of the policy.
        budget_tokens: tokens per head, on average, that a prompt was allowed to keep.
        kept_tokens: prompt tokens kept at the end of prefill, mean over layers and heads.
        evicted_tokens: tokens evicted in prefill and decode, mean over layers and heads.
        kept_ratio: kept / prompt tokens at the end of prefill, mean over layers and heads.
        bytes: bytes of KV cache held when the choices ended.
        peak_bytes: most bytes held at any time.
        decode_evictions: rounds of eviction while generating.
        repeated_tokens: tokens computed besides the prompt to have the model repeat it, or draft an answer.
        window_layers: layers that hold what their window reaches; only bytes count them.
    """

    policy: str
    budget_tokens: int
    kept_tokens: float
    evicted_tokens: float
    kept_ratio: float
    bytes: int
    peak_bytes: int
    decode_evictions: int
    repeated_tokens: int
    window_layers: int

    @classmethod
    def combine(cls, reports: Sequence[KVReport]) -> KVUsage | None:
        """One report for all choices: bytes and evictions are sums, tokens and ratios are means."""
        if not reports:
            return None
        return cls(
            policy=reports[0].policy,
            budget_tokens=round(fmean(r.budget_tokens for r in reports)),
            kept_tokens=round(fmean(r.kept_tokens for r in reports), 3),
            evicted_tokens=round(fmean(r.evicted_tokens for r in reports), 3),
            kept_ratio=round(fmean(r.kept_ratio for r in reports), 6),
            bytes=sum(r.bytes for r in reports),
            peak_bytes=sum(r.peak_bytes for r in reports),
            decode_evictions=sum(r.decode_evictions for r in reports),
            repeated_tokens=sum(r.repeated_tokens for r in reports),
            window_layers=reports[0].window_layers,
        )


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from.

    Attributes:
        cached_tokens: those that were cached from an earlier prompt and not computed.
    """

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the request, and what became of their KV cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails(cached_tokens=0)
    kv: KVUsage | None = None


class Chunk(BaseModel):
    """One event of a stream; it carries `usage` only if the stream was asked to include it."""

    usage: Usage | None = None
