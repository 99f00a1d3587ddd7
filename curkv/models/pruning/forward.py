"""A plain forward over dense batches: what calibration and self-written text run on.

The server's forward (`curkv.models.llama`) reads a paged cache and packed weights; this one needs neither,
exposes the activations inside the MLP, and can be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.models.config import ModelConfig
from curkv.models.llama import rope_tables
from curkv.models.loading import Checkpoint, LayerWeights


def fast_products() -> torch.autocast:
    """Lets the block multiply matrices in bfloat16 if the CPU has instructions for that, else as it is."""
    # Newer than the oldest torch that is supported.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


class DenseCache:
    """Keys and values of B sequences that grow in lockstep.

    Attributes:
        k: [layers, B, kv_heads, capacity, head_dim].
        v: Same.
        length: Tokens stored; the caller advances it after a step.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype):
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype)
        self.v = torch.empty(shape, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, kv_heads, T, head_dim] after `length` and returns everything up to there."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class LayerForward:
    """The arithmetic of one model's decoder layers on x: [B, T, hidden]; weights are given with each call."""

    def __init__(self, config: ModelConfig, max_tokens: int, dtype: torch.dtype = torch.float32):
        self.config = config
        cos, sin = rope_tables(config, max_tokens)
        self._cos, self._sin = cos.to(dtype), sin.to(dtype)

    def __call__(
        self, x: Tensor, weights: LayerWeights, cache: DenseCache | None = None, layer: int = 0
    ) -> Tensor:
        """Runs a whole layer."""
        x = self.attention(x, weights, cache, layer)
        return x + F.linear(self.activations(x, weights), weights.down, weights.down_bias)

    def attention(
        self, x: Tensor, weights: LayerWeights, cache: DenseCache | None = None, layer: int = 0
    ) -> Tensor:
        """Runs the attention half, residual included."""
        config = self.config
        batch, tokens = x.shape[:2]
        qkv = F.linear(self._norm(x, weights.input_norm), weights.qkv, weights.qkv_bias)
        q, k, v = (
            part.view(batch, tokens, -1, config.head_dim).transpose(1, 2)
            for part in torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        )
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)
        start = cache.length if cache else 0
        q, k = self._rotate(q, start), self._rotate(k, start)
        if cache:
            k, v = cache.append(layer, k, v)
        attended = self._attend(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        return x + F.linear(attended, weights.o, weights.o_bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends causally: [B, heads, T, head_dim]."""
        if q.shape[2] > 1:
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        per_kv_head = q.view(len(q), k.shape[1], -1, q.shape[-1])  # K and V are not copied per query head
        return F.scaled_dot_product_attention(per_kv_head, k, v).view(q.shape)

    def activations(self, x: Tensor, weights: LayerWeights) -> Tensor:
        """Returns what the down projection reads, [B, T, intermediate], from x after the attention half."""
        normed = self._norm(x, weights.post_attention_norm)
        gate, up = F.linear(normed, weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, x: Tensor, final_norm: Tensor, head: Tensor) -> Tensor:
        """Returns float32 [..., vocab]."""
        return F.linear(self._norm(x, final_norm), head).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.config.rms_norm_eps)

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        """Applies RoPE to [B, heads, T, head_dim], whose first token has position `start`."""
        end = start + heads.shape[2]
        cos, sin = self._cos[start:end], self._sin[start:end]
        low, high = heads.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


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
        forward = LayerForward(self.config, tokens + (cache.length if cache else 0), self.embedding.dtype)
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
