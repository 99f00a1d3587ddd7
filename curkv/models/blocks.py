"""What decoder layers are made of: weights as they are read, and blocks that run them over kernels.

A block takes what the one before it computed and the residual stream to which that is still to be added, and
returns the same pair: the addition happens where the sum is normalised next, in one pass over the rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from curkv.kernels.dispatch import Kernels
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.linear.spec import Linear
from curkv.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights of an attention block, [out, in] like torch's Linear.

    Attributes:
        norm: [hidden], of what goes in.
        qkv: [q_size + 2 kv_size, hidden]: query, key and value projections, one below the other.
        o: [hidden, q_size].
        qkv_bias: [q_size + 2 kv_size] or None.
        o_bias: [hidden] or None.
        q_norm: [head_dim], of each head's query, or None.
        k_norm: [head_dim], of each head's key, or None.
    """

    norm: Tensor
    qkv: Tensor
    o: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Weights of a gated MLP, [out, in] like torch's Linear.

    Attributes:
        norm: [hidden], of what goes in.
        gate_up: [2 intermediate, hidden]: gate above up.
        down: [hidden, intermediate].
        gate_up_bias: [2 intermediate] or None.
        down_bias: [hidden] or None.
    """

    norm: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer."""

    attention: AttentionWeights
    mlp: MlpWeights


class CacheAttention(Protocol):
    """The cache as a layer sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Applies RoPE, stores keys and values, and attends.

        Args:
            layer: Index of the layer.
            q: [T, num_heads, head_dim], before RoPE, heads contiguous; may be overwritten.
            k: [T, num_kv_heads, head_dim], before RoPE, heads contiguous.
            v: [T, num_kv_heads, head_dim], heads contiguous.
            batch: What the T tokens are, as the attention was made to read it.

        Returns:
            [T, num_heads, head_dim].
        """


class Packer:
    """Makes of weights what runs, and counts their memory.

    Attributes:
        kernels: What they run on.
        form: Of the weights of linear layers.
        nbytes: Memory by kind: embedding, attention, mlp, norm, head.
    """

    def __init__(self, kernels: Kernels, form: WeightFormat = FLOAT32):
        self.kernels = kernels
        self.form = form
        self.nbytes: Counter[str] = Counter()

    def linear(self, kind: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Packs the weight of a linear layer, [N, K], and its bias, [N]; neither is needed afterwards."""
        form = self.form.of_head if kind == "head" else self.form
        linear = self.kernels.pack_linear(weight, bias, form)
        self.nbytes[kind] += linear.nbytes
        return linear

    def keep(self, kind: str, weight: Tensor) -> Tensor:
        """Takes a tensor as it is."""
        self.nbytes[kind] += weight.nbytes
        return weight


class Attention:
    """Self-attention: norm, fused projections, norms of heads, the cache, output projection."""

    def __init__(self, config: ModelConfig, layer: int, weights: AttentionWeights, pack: Packer):
        self._layer = layer
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        self._rms_norm = pack.kernels.rms_norm
        self._norm = pack.keep("norm", weights.norm)
        self._qkv = pack.linear("attention", weights.qkv, weights.qkv_bias)
        self._head_norms: tuple[Tensor, Tensor] | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._head_norms = pack.keep("norm", weights.q_norm), pack.keep("norm", weights.k_norm)
        self._o = pack.linear("attention", weights.o, weights.o_bias)

    def __call__(
        self, x: Tensor, residual: Tensor | None, cache: CacheAttention, batch: Any
    ) -> tuple[Tensor, Tensor]:
        """Runs the block.

        Args:
            x: [T, hidden].
            residual: [T, hidden], to which x is still to be added; None in front of the first block.
            cache: Stores the new keys and values, and attends over everything stored.
            batch: Handed to `cache`.

        Returns:
            [T, hidden], to be added to the other: the sum of x and the residual.
        """
        qkv, residual = self._qkv.after_rms_norm(x, self._norm, self._eps, residual)
        q, k, v = torch.split(qkv.view(len(qkv), -1, self._head_dim), self._heads, dim=1)
        if self._head_norms is not None:
            q, k = (
                self._rms_norm(heads, norm, self._eps)
                for heads, norm in zip((q, k), self._head_norms, strict=True)
            )
        return self._o(cache.attend(self._layer, q, k, v, batch).flatten(1)), residual


class Mlp:
    """The gated MLP: norm, gate and up projections, silu(gate) * up, down projection."""

    def __init__(self, config: ModelConfig, weights: MlpWeights, pack: Packer):
        self._eps = config.rms_norm_eps
        self._norm = pack.keep("norm", weights.norm)
        self._gate_up = pack.linear("mlp", weights.gate_up, weights.gate_up_bias)
        self._down = pack.linear("mlp", weights.down, weights.down_bias)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""
        gate_up, residual = self.gate_up(x, residual)
        return self._down.after_silu_mul(gate_up), residual

    def gate_up(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns gate beside up, [T, 2 intermediate], and the sum of x and the residual."""
        return self._gate_up.after_rms_norm(x, self._norm, self._eps, residual)


class Head:
    """From the last layer to logits: final norm and projection to the vocabulary."""

    def __init__(self, config: ModelConfig, norm: Tensor, weight: Tensor, pack: Packer):
        self._eps = config.rms_norm_eps
        self._norm = pack.keep("norm", norm)
        self._projection = pack.linear("head", weight)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Returns float32 [R, vocab_size] for the sums of R rows of x and of the residual, [R, hidden]."""
        logits, _ = self._projection.after_rms_norm(x, self._norm, self._eps, residual)
        return logits.float()


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer ready to run."""

    attention: Attention
    mlp: Mlp
