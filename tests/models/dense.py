"""A batch and a cache of plain tensors, enough to run a model without pages."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from curkv.kernels.dispatch import get_kernels
from curkv.models.config import ModelConfig
from curkv.models.rope import rope_tables

REFERENCE = get_kernels("reference")


@dataclass
class DenseBatch:
    """New tokens of several sequences, one after another."""

    token_ids: Tensor
    positions: Tensor
    query_start: list[int]
    logit_rows: Tensor

    @classmethod
    def of(cls, texts: list[list[int]], starts: list[int]) -> "DenseBatch":
        """Flattens the texts, whose first new tokens are at `starts`; every row's logits are wanted."""
        tokens = [token for text in texts for token in text]
        positions = [start + i for text, start in zip(texts, starts, strict=True) for i in range(len(text))]
        ends = torch.tensor([len(text) for text in texts]).cumsum(0).tolist()
        return cls(torch.tensor(tokens), torch.tensor(positions), [0, *ends], torch.arange(len(tokens)))


class DenseAttention:
    """Causal attention over keys and values kept in lists, one per layer and sequence of the batch."""

    def __init__(self, config: ModelConfig):
        self._rope = rope_tables(config)
        self._stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: DenseBatch) -> Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k = (self._rotate(layer, heads, batch.positions) for heads in (q, k))
        spans = pairwise(batch.query_start)
        return torch.cat([self._sequence(layer, i, q[a:b], k[a:b], v[a:b]) for i, (a, b) in enumerate(spans)])

    def _sequence(self, layer: int, sequence: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (layer, sequence) in self._stored:
            before = self._stored[layer, sequence]
            k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        self._stored[layer, sequence] = (k, v)
        group = q.shape[1] // k.shape[1]
        q, k, v = (
            x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        )
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)

    def _rotate(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (table[positions][:, None] for table in self._rope[layer])
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
