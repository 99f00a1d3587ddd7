"""StreamingLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.options import EvictionOptions
from curkv.cache.policies.base import SAME_FOR_ALL_HEADS, CacheView, Policy

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


class StreamingLLM(Policy):
    """StreamingLLM (https://arxiv.org/abs/2309.17453, section 3.2): attention sinks and the most recent
    tokens.

    Tokens score by position; the sinks are those that every policy keeps, 4 in the paper. Unlike there,
    rotary positions stay those of the text.
    """

    name = "streaming-llm"
    description = "StreamingLLM: the first 4 and the most recent tokens"
    allocations = SAME_FOR_ALL_HEADS
    published_sinks = 4

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by their position."""
        return view.gather(view.pages.position, -1).float().masked_fill_(~view.stored, float("-inf"))
