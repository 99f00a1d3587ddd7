"""A forward over dense batches: what calibration and self-written text run on.

It runs the blocks of the server's forward over the reference kernels and plain tensors, with weights given at
each call: no pages, no packing, the activations inside the MLP exposed, and all of it differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curkv.kernels.dispatch import get_kernels
from curkv.models.blocks import Layer, LayerWeights, Mlp, Packer
from curkv.models.config import ModelConfig
from curkv.models.dense import DenseAttention, DenseCache
from curkv.models.families import family_of
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables


def fast_products() -> torch.autocast:
    """Lets the block multiply matrices in bfloat16 if the CPU has instructions for that, else as it is."""
    # Newer than the oldest torch that is supported.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


class LayerForward:
    """The arithmetic of one model's decoder layers on x: [B, T, hidden]; weights are given with each call."""

    def __init__(self, config: ModelConfig, max_tokens: int):
        self._config = config
        self._family = family_of(config)
        self._pack = Packer(get_kernels("reference"))
        self._rope = rope_tables(config, max_tokens)

    def __call__(
        self, x: Tensor, weights: LayerWeights, cache: DenseCache | None = None, layer: int = 0
    ) -> Tensor:
        """Runs a whole layer."""
        x = self.attention(x, weights, cache, layer)
        out, total = self._layer(weights).feed(x.flatten(0, 1), None)
        return (total + out).view_as(x)

    def attention(
        self, x: Tensor, weights: LayerWeights, cache: DenseCache | None = None, layer: int = 0
    ) -> Tensor:
        """Runs the attention half, residual included."""
        attention = DenseAttention(self._config, self._rope, len(x), cache)
        out, total = self._layer(weights, layer).attention(x.flatten(0, 1), None, attention, None)
        return (total + out).view_as(x)

    def activations(self, x: Tensor, weights: LayerWeights) -> Tensor:
        """Returns what the down projection reads, [B, T, intermediate], from x after the attention half."""
        gate_up, _ = Mlp(self._config, weights.mlp, self._pack).gate_up(x.flatten(0, 1), None)
        return self._pack.kernels.silu_mul(gate_up).view(*x.shape[:2], -1)

    def logits(self, x: Tensor, final_norm: Tensor, head: Tensor) -> Tensor:
        """Returns float32 [..., vocab]."""
        block = self._family.head_block(self._config, final_norm, head, self._pack)
        return block(x.flatten(0, -2), None).view(*x.shape[:-1], -1)

    def _layer(self, weights: LayerWeights, index: int = 0) -> Layer:
        return self._family.layer_blocks(self._config, index, weights, self._pack)


class _MappedLayers(Sequence[LayerWeights]):
    """The layers of a checkpoint, read each time that one is asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __len__(self) -> int:
        return self._checkpoint.config.num_layers

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._checkpoint.layer(index)


@dataclass
class Model:
    """A model's weights and its forward.

    Attributes:
        config: Shape of the model.
        embedding: [vocab, hidden].
        layers: One per decoder layer.
        final_norm: [hidden].
        head: [vocab, hidden].
    """

    config: ModelConfig
    embedding: Tensor
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    head: Tensor

    @classmethod
    def mapped(cls, checkpoint: Checkpoint) -> Model:
        """Reads a layer whenever it runs, so that a large model in bfloat16 is never held in float32."""
        layers = _MappedLayers(checkpoint)
        return cls(checkpoint.config, checkpoint.embedding, layers, checkpoint.final_norm, checkpoint.head)

    def hidden(self, token_ids: Tensor, cache: DenseCache | None = None) -> Tensor:
        """Returns [B, T, hidden] after the last layer, before the final norm, from int64 [B, T]."""
        tokens = token_ids.shape[1]
        forward = LayerForward(self.config, tokens + (cache.length if cache else 0))
        x = self.embedding[token_ids]
        for index, weights in enumerate(self.layers):
            x = forward(x, weights, cache, index)
        if cache:
            cache.length += tokens
        return x

    def logits(self, token_ids: Tensor, cache: DenseCache | None = None, last: bool = False) -> Tensor:
        """Returns float32 [B, T, vocab], or [B, 1, vocab] of the last token only."""
        x = self.hidden(token_ids, cache)
        forward = LayerForward(self.config, 1)
        return forward.logits(x[:, -1:] if last else x, self.final_norm, self.head)
