"""What the engine tells its sinks after each step: plain data, no metrics library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from curkv.cache.store import StoreStats
from curkv.engine.types import FinishReason, KVReport


@dataclass(frozen=True)
class EvictionStats:
    """One eviction of one sequence, all layers at once.

    Attributes:
        policy: name of the policy.
        phase: after the prompt or while generating.
        tokens_evicted: tokens dropped, summed over layers and heads.
        pages_freed: pages given back to the pool; 0 if more had to be copied, because others use them too.
        seconds: scoring, selection and compaction.
        kept_ratio: tokens kept / tokens stored before, mean over layers and heads.
        head_budgets: int [layers, kv_heads], tokens each head kept.
    """

    policy: str
    phase: Literal["prefill", "decode"]
    tokens_evicted: int
    pages_freed: int
    seconds: float
    kept_ratio: float
    head_budgets: NDArray[np.integer]


@dataclass(frozen=True)
class RequestStats:
    """One choice that ended, however it ended. Times are in seconds.

    Attributes:
        finish_reason: why it ended.
        prompt_tokens: tokens of the prompt.
        generation_tokens: tokens generated.
        queue_seconds: arrival to first scheduled.
        prefill_seconds: first scheduled to first token.
        decode_seconds: first token to last token.
        e2e_seconds: arrival to end.
        ttft_seconds: arrival to first token; None if there was none.
        itl_seconds: gaps between successive tokens.
        kv: eviction report; None if the choice ended before its prefill did.
        request_id: id of its request.
        traceparent: the span that its request belongs to; "" if none.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    e2e_seconds: float
    ttft_seconds: float | None = None
    itl_seconds: list[float] = field(default_factory=list)
    kv: KVReport | None = None
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class SequenceStats:
    """Where one running sequence stands.

    Attributes:
        request_id: id of its request.
        index: which of the request's choices it is.
        policy: name of its eviction policy.
        prompt_tokens: tokens of its prompt.
        computed_tokens: tokens whose K and V have been written, kept or not.
        generation_tokens: tokens generated.
        budget_tokens: tokens per head, on average, that its prompt may keep.
        held_tokens: tokens that a head holds now, mean over layers and heads.
        held_bytes: bytes of its pages; pages shared with another choice count for both.
        peak_bytes: most bytes it held at the end of any step so far.
        owner: name of the API key that its request came with.
    """

    request_id: str
    index: int
    policy: str
    prompt_tokens: int
    computed_tokens: int
    generation_tokens: int
    budget_tokens: int
    held_tokens: float
    held_bytes: int
    peak_bytes: int
    owner: str = ""


@dataclass(frozen=True)
class StepStats:
    """State of the engine after a step, and what happened in it.

    Attributes:
        running: sequences being prefilled or decoded.
        waiting: sequences in the queue.
        used_pages: pages owned by sequences.
        num_pages: pages of the pool.
        used_bytes: bytes of the used pages.
        capacity_bytes: bytes of the pool.
        stranded_slots_ratio: token slots of used pages that hold no token / all slots of used pages.
        prompt_tokens: prompt tokens computed in the step.
        generation_tokens: tokens sampled in the step.
        kv_tokens_written: tokens written to the cache, summed over layers and heads.
        preemptions: sequences preempted in the step.
        evictions: evictions of the step.
        finished: choices that ended in the step or were aborted since the previous one.
        sequences: the running sequences, in the order they were admitted.
        step_seconds: duration of the step.
        prefix_bytes: bytes of the pages cached as prefixes, whether sequences use them or not.
        prefix_saved_bytes: bytes that more would be taken if sequences and prefixes shared no pages.
        prefix_queries: prompt tokens of the sequences that first ran in the step, if prefixes are cached.
        prefix_hits: of these, tokens that a cached prefix had.
        started: ids of the requests that first ran in the step.
        sessions: conversations that can go on from what is held of them.
        session_bytes: bytes of the pages held of them, a part of `prefix_bytes`.
        store: what the prefix store has done since the start.
        exchanged: bytes of tensors handed to other processes of the model since the start, by what they were.
    """

    running: int
    waiting: int
    used_pages: int
    num_pages: int
    used_bytes: int
    capacity_bytes: int
    stranded_slots_ratio: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    kv_tokens_written: int = 0
    preemptions: int = 0
    evictions: list[EvictionStats] = field(default_factory=list)
    finished: list[RequestStats] = field(default_factory=list)
    sequences: list[SequenceStats] = field(default_factory=list)
    step_seconds: float = 0.0
    prefix_bytes: int = 0
    prefix_saved_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    started: list[str] = field(default_factory=list)
    sessions: int = 0
    session_bytes: int = 0
    store: StoreStats = field(default_factory=StoreStats)
    exchanged: Mapping[str, int] = field(default_factory=dict)


StatsSink = Callable[[StepStats], None]
