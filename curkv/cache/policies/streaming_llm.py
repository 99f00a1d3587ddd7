"""StreamingLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from curkv.cache.policies.base import CacheView, Needs

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels


class StreamingLLM:
    """StreamingLLM (https://arxiv.org/abs/2309.17453, section 3.2): attention sinks and the most recent
    tokens.

    Tokens score by position; the sinks are those that every policy keeps, 4 in the paper. Unlike there,
    rotary positions stay those of the text.
    """

    name = "streaming-llm"
    description = "StreamingLLM: the first 4 and the most recent tokens"
    needs = Needs()
    allocation: Literal["uniform", "adaptive"] = "uniform"
    published_sinks = 4
    reads: frozenset[str] = frozenset()

    def score(self, view: CacheView, options: EvictionOptions, kernels: Kernels) -> Tensor:
        """Score tokens by their position."""
        return view.gather(view.pages.position, -1).float().masked_fill_(~view.stored, float("-inf"))
