"""Bodies of POST /v1/kv/explain."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from curkv.server.headers import KVFields
from curkv.server.limits import MAX_POLICIES
from curkv.server.prompts import PromptFields
from curkv.server.protocol import Usage

Span = tuple[int, int]


class ExplainRequest(PromptFields):
    """A prompt, and the policies to be asked about it."""

    policies: Annotated[list[KVFields], Field(min_length=1, max_length=MAX_POLICIES)] | None = Field(
        None,
        description="Eviction controls of each; absent: one, as `kv`, headers and the server's defaults say.",
        examples=[[{"policy": "curdkv", "budget": "25%"}, {"policy": "streaming-llm", "budget": "25%"}]],
    )
    kv: KVFields | None = Field(None, description="Eviction controls if `policies` is absent.")
    scores: bool | None = Field(False, description="Add each token's rank among its head's scores.")
    priority: int | None = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")


class PolicyExplanation(BaseModel):
    """What one policy would keep of n prompt tokens in L layers of H KV heads.

    Attributes:
        policy: its name.
        budget_tokens: tokens per head, on average, that it may keep.
        kept_ratio: kept / prompt tokens, mean over layers and heads.
        kept: [L][H] lists of spans of kept tokens, ascending, the end exclusive.
        mean: [n], share of all heads that keep the token.
        scores: base64 of uint8 [L, H, n]: rank among the head's scores, 255 highest; null if not asked for.
        bytes_full: bytes of the pages that the prompt holds.
        bytes_kept: bytes of the pages that it would hold.
        error: mean of head_errors.
        head_errors: [L][H], relative change of the attention output of the prompt's last queries.
    """

    policy: str
    budget_tokens: int
    kept_ratio: float
    kept: list[list[list[Span]]]
    mean: list[float]
    scores: str | None = None
    bytes_full: int
    bytes_kept: int
    error: float
    head_errors: list[list[float]]


class ExplainResponse(BaseModel):
    """What each policy would keep.

    Attributes:
        num_layers: L, those that policies evict from.
        layers: [L], which layers of the model these are.
    """

    id: str
    object: Literal["kv.explanation"] = "kv.explanation"
    created: int
    model: str
    num_layers: int
    layers: list[int]
    num_kv_heads: int
    token_ids: list[int]
    tokens: list[str]
    policies: list[PolicyExplanation]
    usage: Usage
