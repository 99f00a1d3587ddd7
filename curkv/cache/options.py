"""What a request can ask of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from curkv.cache.budgets import Budget

Span = tuple[int, int]
Leverage = Literal["window", "norm", "sketch", "exact"]
Allocation = Literal["uniform", "adaptive", "pyramid"]


class OptionError(ValueError):
    """An option is wrong, or contradicts others.

    Attributes:
        field: The option.
        message: What is wrong with it, naming the options it contradicts.
        others: The options it contradicts.
    """

    def __init__(self, field: str, message: str, others: tuple[str, ...] = ()) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.others = others


@dataclass(frozen=True)
class Preset:
    """Published or recommended settings.

    Attributes:
        leverage: CurDKV's "window" or "sketch".
        partial_window: How "window" treats the last, partial window; see `leverage_scores`.
        sink_tokens: First tokens kept; None: as the policy was published.
        recent_tokens: Newest tokens kept, or a quarter of the budget if that is less.
    """

    leverage: Leverage
    partial_window: Literal["corrected", "left", "right"]
    sink_tokens: int | None
    recent_tokens: int


PRESETS = {
    # Without a recent window a policy that reads no queries loses the thread of the text.
    "serving": Preset("window", "corrected", sink_tokens=4, recent_tokens=64),
    "paper": Preset("sketch", "corrected", sink_tokens=None, recent_tokens=0),
    "authors": Preset("window", "left", sink_tokens=None, recent_tokens=0),
    "kvpress": Preset("window", "right", sink_tokens=None, recent_tokens=0),
}


@dataclass(frozen=True)
class EvictionOptions:
    """What a request asks of its cache. None means what the preset says.

    Attributes:
        policy: One of `policy_names()`.
        budget: What may be kept of the prompt; None keeps all of it.
        decode_budget: What may be held while generating; None: generated tokens are not evicted.
        preset: One of `PRESETS`.
        sink_tokens: First tokens of the prompt that are always kept, 4 in StreamingLLM and CurDKV.
        recent_tokens: Newest tokens that are always kept.
        protect: Spans (start, end) of the prompt that are always kept, end exclusive; disjoint and ascending.
        seed: Of random numbers; None derives it from the prompt, so that a repeat is a repeat.
        leverage: CurDKV's energies: "window" (shares of ||k||^2 in windows), "norm" (shares of the whole
            head), "sketch" (random projection) or "exact" (statistical leverage).
        rank: Columns of the sketch, 20 in the paper (section 3).
        window: Tokens of a window, 16 in the authors' code.
        combine: How CurDKV combines the terms of key and value.
        pool: Odd kernel size of a 1-D pooling of the scores over a head's stored tokens; 1 is off.
        pool_kind: What the pooling takes of its neighbourhood.
        allocation: How heads and layers share the budget: "uniform", "adaptive" (heads of a layer compete;
            Ada-KV) or "pyramid" (lower layers get more; PyramidKV).
        alpha: Share of the kept tokens that each head is sure of under adaptive allocation, 0.2 in Ada-KV.
        beta: Steepness of the pyramid: its last layer gets 1 / beta of the mean, 20 in PyramidKV.
        observation: Newest tokens whose queries judge the others, 32 in SnapKV.
        reduction: What counts of the observed queries' attention, the "mean" or the "max"imum over them.
        times: A second policy whose scores are multiplied with those of the first.
        times_pool: Pooling of the second policy's scores.
        scorer: Whose scores ChunkKV takes.
        chunk: Tokens that ChunkKV keeps or drops together, and over which SnapCUR finds passages.
        first_stage: Share of the budget that CriticalKV gives to attention alone, and SnapCUR to passages.
        future: Positions after the prompt that Expected Attention averages over.
        blend: Weight of leverage beside attention in Compactor.
        block: Tokens of a block of Compactor's attention.
        ladder: Tokens over which LaCache's pattern repeats.
        decode_interval: Generated tokens between two evictions, 64 in VaSE.
        merge: What becomes of evicted tokens: "none", or "nearest": merged into the most similar kept key.
        merge_threshold: Least cosine of two keys that are merged.
        context_tokens: First tokens of the prompt that are compressed before the rest is computed; the rest
            is kept. None: the whole prompt.
        prefill: "exact" evicts once, when all is computed; "streaming" to the budget after every chunk.
        prefill_chunk: Tokens of such a chunk.
    """

    policy: str = "full"
    budget: Budget | None = None
    decode_budget: Budget | None = None
    preset: str = "serving"
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    protect: tuple[Span, ...] = ()
    seed: int | None = None
    leverage: Leverage | None = None
    rank: int = 20
    window: int = 16
    combine: Literal["product", "mean", "key", "value"] | None = None
    pool: int | None = None
    pool_kind: Literal["max", "mean"] | None = None
    allocation: Allocation | None = None
    alpha: float = 0.2
    beta: float = 20.0
    observation: int | None = None
    reduction: Literal["mean", "max"] | None = None
    times: str | None = None
    times_pool: int | None = None
    scorer: Literal["snapkv", "curdkv"] = "snapkv"
    chunk: int | None = None
    first_stage: float = 0.5
    future: int = 512
    blend: float = 0.5
    block: int = 256
    ladder: int = 256
    decode_interval: int | None = None
    merge: Literal["none", "nearest"] = "none"
    merge_threshold: float = 0.6
    context_tokens: int | None = None
    prefill: Literal["exact", "streaming"] = "exact"
    prefill_chunk: int = 512

    @property
    def partial_window(self) -> Literal["corrected", "left", "right"]:
        """How the preset treats a partial window."""
        return PRESETS[self.preset].partial_window
