"""The forward pass of Llama, Mistral, Qwen2, Qwen3 and SmolLM over the flattened tokens of a batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curkv.models.config import Llama3Scaling, ModelConfig
from curkv.models.loading import Checkpoint, LayerWeights

Rounding = Literal["int8", "int4"]
"""What the weights of linear layers may be rounded to."""


class Linear(Protocol):
    """A linear layer: x [T, K] to [T, N]; see curkv/kernels/linear/reference.py."""

    def __call__(self, x: Tensor) -> Tensor: ...  # noqa: D102

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The product with the normalised rows of x plus the residual, and that sum."""

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """The product with the gated activation of [T, 2 K]."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""


class Batch(Protocol):
    """What the forward reads of a batch of T tokens; the attention reads the rest.

    Attributes:
        token_ids: int64 [T], the sequences' new tokens one after another.
        logit_rows: int64 [R], the tokens whose logits are wanted.
    """

    @property
    def token_ids(self) -> Tensor: ...  # noqa: D102

    @property
    def logit_rows(self) -> Tensor: ...  # noqa: D102


class Attention(Protocol):
    """The cache as the forward sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Applies RoPE, stores keys and values, and attends.

        Args:
            layer: Index of the layer.
            q: [T, num_heads, head_dim], before RoPE, heads contiguous; may be overwritten.
            k: [T, num_kv_heads, head_dim], before RoPE, heads contiguous.
            v: [T, num_kv_heads, head_dim], heads contiguous.
            batch: The batch given to `Llama.forward`.

        Returns:
            [T, num_heads, head_dim].
        """


class ModelKernels(Protocol):
    """The operations of the forward outside attention; signatures in curkv/kernels/<op>/reference.py."""

    @property
    def gather_rows(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`gather_rows(source[N, d], rows[T]) -> [T, d]`."""

    @property
    def rms_norm(self) -> Callable[..., Any]:
        """`rms_norm(x[..., d], weight[d], eps) -> [..., d]`."""

    @property
    def pack_linear(self) -> Callable[[Tensor, Tensor | None], Linear]:
        """`pack_linear(weight[N, K], bias[N] | None)` returns the function from x[T, K] to [T, N]."""

    @property
    def pack_linear_int8(self) -> Callable[[Tensor, Tensor | None], Linear]:
        """The same with weights rounded to int8."""

    @property
    def pack_linear_int4(self) -> Callable[[Tensor, Tensor | None], Linear]:
        """The same with weights rounded to 4 bits."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer ready to run: its norm weights and its packed projections."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """A decoder of the Llama family.

    Attributes:
        config: its shape.
        weights_bytes: memory of its weights by kind: embedding, attention, mlp, norm, head.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        kernels: ModelKernels,
        rounding: Rounding | None = None,
    ):
        """Reads the weights; those of the linear layers are rounded as told, but the head's never to int4."""
        self.config = config
        self._rounding = rounding
        self._kernels = kernels
        self._checkpoint = checkpoint
        self.weights_bytes: Counter[str] = Counter()
        self._head = self._linear("head", checkpoint.head)  # first, while little else is held beside it
        self._embedding = self._counted("embedding", checkpoint.embedding)
        self._layers = [self._pack(checkpoint.layer(index)) for index in range(config.num_layers)]
        self._final_norm = self._counted("norm", checkpoint.final_norm)

    @property
    def weights(self) -> str:
        """Type of the linear layers' weights."""
        return self._rounding or str(self._final_norm.dtype).removeprefix("torch.")

    @torch.no_grad()
    def forward(self, batch: Batch, kv: Attention) -> Tensor:
        """Runs the batch's new tokens through the model.

        Args:
            batch: The T new tokens and the R rows whose logits are wanted.
            kv: Stores the new keys and values, and attends over everything stored.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`.
        """
        eps, gather_rows = self.config.rms_norm_eps, self._kernels.gather_rows
        x, rows = gather_rows(self._embedding, batch.token_ids), batch.logit_rows
        residual: Tensor | None = None
        for index, layer in enumerate(self._layers):
            qkv, residual = layer.qkv.after_rms_norm(x, layer.input_norm, eps, residual)
            q, k, v = self._heads(layer, qkv)
            x = layer.o(kv.attend(index, q, k, v, batch).reshape(-1, self.config.q_size))
            gate_up, residual = layer.gate_up.after_rms_norm(x, layer.post_attention_norm, eps, residual)
            x = layer.down.after_silu_mul(gate_up)
        x, residual = gather_rows(x, rows), None if residual is None else gather_rows(residual, rows)
        logits, _ = self._head.after_rms_norm(x, self._final_norm, eps, residual)
        return logits.float()

    def output_projection(self, index: int) -> Tensor:
        """W_o of a layer, by query head: [num_heads, head_dim, hidden]; read from the checkpoint."""
        weight = self._checkpoint.attention_output(index)
        return weight.T.reshape(self.config.num_heads, self.config.head_dim, -1)

    def _heads(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, q_size + 2 kv_size] as queries, keys and values, [T, heads, head_dim] each."""
        config = self.config
        heads = qkv.view(len(qkv), -1, config.head_dim)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            eps, rms_norm = config.rms_norm_eps, self._kernels.rms_norm
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        return q, k, v

    def _pack(self, weights: LayerWeights) -> Layer:
        q_norm, k_norm = weights.q_norm, weights.k_norm
        return Layer(
            input_norm=self._counted("norm", weights.input_norm),
            qkv=self._linear("attention", weights.qkv, weights.qkv_bias),
            q_norm=None if q_norm is None else self._counted("norm", q_norm),
            k_norm=None if k_norm is None else self._counted("norm", k_norm),
            o=self._linear("attention", weights.o, weights.o_bias),
            post_attention_norm=self._counted("norm", weights.post_attention_norm),
            gate_up=self._linear("mlp", weights.gate_up, weights.gate_up_bias),
            down=self._linear("mlp", weights.down, weights.down_bias),
        )

    def _linear(self, kind: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        if self._rounding is None:
            linear = self._kernels.pack_linear(weight, bias)
        elif self._rounding == "int8" or kind == "head":
            linear = self._kernels.pack_linear_int8(weight, bias)
        else:
            linear = self._kernels.pack_linear_int4(weight, bias)
        self.weights_bytes[kind] += linear.nbytes
        return linear

    def _counted(self, kind: str, weight: Tensor) -> Tensor:
        self.weights_bytes[kind] += weight.nbytes
        return weight


def rope_tables(config: ModelConfig, max_positions: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of every position, computed in float32 as transformers does.

    Args:
        config: The model.
        max_positions: Rows wanted, `config.max_positions` unless told.

    Returns:
        cos, sin: float32 [max_positions, head_dim / 2].
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    positions = torch.arange(max_positions or config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def _scale_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones, and blends linearly between the two."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
