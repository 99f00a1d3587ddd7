"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.policies.base import Policy, Published
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """StreamingLLM (https://arxiv.org/abs/2309.17453, section 3.2): attention sinks and the most recent
    tokens.

    Tokens score by position; the sinks are those that every policy keeps, 4 in the paper. Unlike there,
    rotary positions stay those of the text.
    """

    name: str = "streaming-llm"
    description: str = "StreamingLLM: the first 4 and the most recent tokens"
    published: Published = Published(sinks=4)
    heads_compete = False

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens by their position."""
        return view.gather(view.pages.position, -1).float().masked_fill_(~view.stored, float("-inf"))
