"""A small random Llama, for what does not depend on sense."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.models.config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_positions=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
)


def random_checkpoint(
    device: str = "cpu", dtype: torch.dtype = torch.float32, num_layers: int = CONFIG.num_layers
) -> SimpleNamespace:
    """Weights of a model whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    c = CONFIG

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

    def ones(size: int) -> Tensor:
        return torch.ones(size, device=device, dtype=dtype)

    layers = [
        LayerWeights(
            AttentionWeights(
                norm=ones(c.hidden_size),
                qkv=weight(c.q_size + 2 * c.num_kv_heads * c.head_dim, c.hidden_size),
                o=weight(c.hidden_size, c.q_size),
                q_norm=1.5 * ones(c.head_dim),
                k_norm=1.5 * ones(c.head_dim),
            ),
            MlpWeights(
                norm=ones(c.hidden_size),
                gate_up=weight(2 * c.intermediate_size, c.hidden_size),
                down=weight(c.hidden_size, c.intermediate_size),
            ),
        )
        for _ in range(num_layers)
    ]
    return SimpleNamespace(
        embedding=weight(c.vocab_size, c.hidden_size) * c.hidden_size**0.5,
        final_norm=ones(c.hidden_size),
        head=weight(c.vocab_size, c.hidden_size),
        layer=layers.__getitem__,
        attention_output=lambda index: layers[index].attention.o,
    )
