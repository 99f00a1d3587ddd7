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
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from curkv.engine.types import KVReport, SamplingParams
from curkv.server.headers import KVFields
from curkv.server.limits import (
    MAX_CHOICES,
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

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
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


class GenerationFields(StructureFields):
    """Sampling, streaming and eviction fields; unknown ones are kept aside, to be logged."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="A name from GET /v1/models; absent: the one served.")
    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens.")
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: Int64 | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
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

    @property
    def unknown_fields(self) -> list[str]:
        """Names of fields that this server does not know."""
        return sorted(self.model_extra or {})

    @property
    def choices_per_prompt(self) -> int:
        """`n`, with its default."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's form; null means the default, as in OpenAI's API.

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
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
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
            structure=self.structure,
            **given,
        )


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
