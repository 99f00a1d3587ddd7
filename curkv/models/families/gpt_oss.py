"""gpt-oss: experts of clamped SwiGLU, attention sinks, every other layer with a window; MXFP4 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curkv.models.blocks import Feed, LayerWeights, MixtureWeights, Packer
from curkv.models.config import LayerKind, ModelConfig, read_mixture, read_shape, read_window, sliding_layers
from curkv.models.families.base import Family, Piece, Read
from curkv.models.families.gguf_names import EXPERT_TENSORS, GGUF
from curkv.models.mixture import Mixture

DEFAULTS = {
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
}
DEFAULT_HEAD_DIM, EVERY_WHICH_IS_FULL = 64, 2
"""What transformers assumes if config.json does not say."""

ALPHA, LIMIT = 1.702, 7.0
"""Of the activation."""

MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The numbers of 4 bits (OCP Microscaling Formats 1.0, section 5.3.3)."""
MXFP4_BIAS = 127
"""Of the exponents that blocks of 32 numbers have in common."""


class GptOss(Family):
    """Biases throughout."""

    title = "gpt-oss: experts, windows, sinks, MXFP4"
    model_type = "gpt_oss"
    architectures = ("GptOssForCausalLM", "GptOssModel")
    prunable = False
    gguf_architecture = "gpt-oss"
    gguf_windows = True
    gguf_tensors = {name: tensor for name, tensor in EXPERT_TENSORS.items() if name != "ffn_norm"} | {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    }
    gguf_settings = {  # noqa: RUF012
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    }

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = DEFAULTS | dict(raw)
        quantised = raw.get("quantization_config")
        if isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
            del raw["quantization_config"]
        config = read_shape(raw, self.architectures[0], DEFAULT_HEAD_DIM)
        sliding = sliding_layers(raw, config.num_layers, EVERY_WHICH_IS_FULL)
        kinds = LayerKind(config.rope), LayerKind(config.rope, read_window(raw))
        bias = bool(raw["attention_bias"])
        return replace(
            config,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=True,
            sinks=True,
            layers=tuple(kinds[slides] for slides in sliding),
            mixture=read_mixture(raw),
        )

    def tensor_of_gguf(self, name: str) -> str:
        """See `Family.tensor_of_gguf`."""
        return super().tensor_of_gguf(name).replace(".sinks.weight", ".sinks")

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """See `Family.config_of_gguf`; YaRN's range of frequencies is not rounded."""
        config = super().config_of_gguf(gguf)
        if config["rope_scaling"]:
            config["rope_scaling"]["truncate"] = False
        return config

    def mixture(self, read: Read, config: ModelConfig, prefix: str) -> MixtureWeights:
        """See `Family.mixture`."""
        assert config.mixture is not None
        count = config.mixture.num_experts
        return MixtureWeights(
            norm=None,
            router=read(f"{prefix}.router.weight", count, config.hidden_size),
            router_bias=read(f"{prefix}.router.bias", count),
            experts=(self.mlp(read, config, f"{prefix}.experts.{i}") for i in range(count)),
        )

    def gate_up(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """See `Family.gate_up`."""
        return read(name.format("gate_up_proj"), 2 * config.intermediate_size, *columns)

    def feed_block(self, config: ModelConfig, weights: LayerWeights, pack: Packer) -> Feed:
        """See `Family.feed_block`."""
        assert isinstance(weights.feed, MixtureWeights)
        return Mixture(
            config, weights.feed, pack, partial(pack.kernels.clamped_mul, alpha=ALPHA, limit=LIMIT)
        )

    def pieces(self, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Piece]:
        """See `Family.pieces`; experts in stacks, whose rows of gate and up take turns; GGUF's of either."""
        pieces: dict[str, Piece] = {}
        for name, (rows, *columns) in found.items():
            if ".experts." in name and ".gate_proj." in name:
                halves = name, name.replace(".gate_proj.", ".up_proj.")
                both = name.replace(".gate_proj.", ".gate_up_proj.")
                pieces[both] = Piece(halves, (2 * rows, *columns), _stacked)
        for name, shape in found.items():
            prefix, _, ending = name.partition(".experts.")
            part = next((part for part in ("gate_up_proj", "down_proj") if ending.startswith(part)), "")
            sources: tuple[str, ...] = (name,)
            take: Callable[..., Tensor] = _transposed
            kind, own = "weight", shape[:0:-1]
            if ending == f"{part}_bias":
                take, kind, own = _bias, "bias", shape[1:]
            elif ending == f"{part}_blocks":
                sources, take = (name, f"{prefix}.experts.{part}_scales"), mxfp4
                own = (shape[1], 2 * shape[2] * shape[3])
            elif not part or ending != part:
                continue
            for expert in range(shape[0]):
                one = partial(_of_expert, take, expert, part == "gate_up_proj")
                pieces[f"{prefix}.experts.{expert}.{part}.{kind}"] = Piece(sources, own, one)
        return pieces


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values of rows in MXFP4: float32 [rows, columns].

    Args:
        blocks: uint8 [rows, columns / 32, 16], two numbers each, the first in the low half.
        scales: uint8 [rows, columns / 32], exponents of blocks.
    """
    numbers = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = MXFP4[numbers.int()].ldexp(scales.int()[..., None] - MXFP4_BIAS)
    return values.flatten(-2)


def _of_expert(take: Callable[..., Tensor], expert: int, halved: bool, *stacks: Tensor) -> Tensor:
    """What an expert has of stacks; of gate and up, whose rows take turns, gate above up."""
    rows = take(*(stack[expert] for stack in stacks))
    return torch.cat([rows[::2], rows[1::2]]) if halved else rows


def _stacked(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _transposed(rows: Tensor) -> Tensor:
    return rows.T


def _bias(rows: Tensor) -> Tensor:
    return rows
