"""A short self-distillation: what is left of a model learns to predict its own text as the whole did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.models.config import ModelConfig
from curkv.models.pruning.forward import LayerForward, Model, fast_products
from curkv.models.pruning.methods.base import DOWN

LEARNING_RATE = 3e-4
WARM_UP = 10
"""Steps until the learning rate is reached; from there it falls linearly to nothing."""
BETAS = (0.9, 0.95)
MAX_NORM = 1.0
"""Largest norm of the gradient; a longer one is shortened to it."""
BATCH = 4
"""Texts of a step."""

TRAINED_OF_ATTENTION = ("norm", "qkv", "o")
TRAINED_OF_MLP = ("norm", "gate_up", "down")


def distil(
    model: Model,
    text: Tensor,
    dense: Sequence[Tensor],
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[float]:
    """Trains the layers of a model to minimise KL(dense || model) of the next token (AdamW).

    Args:
        model: Layers in float32; they are replaced by trained ones.
        text: int64 [sequences, tokens].
        dense: float32 [tokens, hidden] for each text: what the dense model's last layer makes of it.
        steps: Of four texts each.
        seed: Of the order of the texts.
        progress: Called with the steps done, and with all of them.

    Returns:
        The loss of each step, in nats per token.
    """
    layers = [_trainable(weights) for weights in model.layers]
    model.layers = layers
    parameters = [parameter for weights in layers for parameter in _trained(weights)]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0, fused=True)
    order = torch.split(_shuffled(len(text), steps * BATCH, seed), BATCH)
    losses = []
    for step, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        loss = _divergence(model, text[chosen], torch.stack([dense[index] for index in chosen.tolist()]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
        progress(step + 1, steps)
    return losses


def trained_tensors(weights: LayerWeights, config: ModelConfig) -> dict[str, Tensor]:
    """Returns what `distil` changes in a layer by its names in a checkpoint, below `model.layers.<i>.`."""
    attention, mlp = weights.attention, weights.mlp
    q, k, v = torch.split(attention.qkv, [config.q_size, config.kv_size, config.kv_size])
    gate, up = mlp.gate_up.chunk(2)
    return {
        name: tensor.detach()
        for name, tensor in {
            "input_layernorm.weight": attention.norm,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": attention.o,
            "post_attention_layernorm.weight": mlp.norm,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            DOWN: mlp.down,
        }.items()
        if tensor is not None
    }


def _trainable(weights: LayerWeights) -> LayerWeights:
    return LayerWeights(
        replace(weights.attention, **_copies(weights.attention, TRAINED_OF_ATTENTION)),
        replace(weights.mlp, **_copies(weights.mlp, TRAINED_OF_MLP)),
    )


def _copies(weights: AttentionWeights | MlpWeights, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(weights, name).clone().requires_grad_() for name in names}


def _trained(weights: LayerWeights) -> list[Tensor]:
    return [
        *(getattr(weights.attention, name) for name in TRAINED_OF_ATTENTION),
        *(getattr(weights.mlp, name) for name in TRAINED_OF_MLP),
    ]


def _shuffled(count: int, wanted: int, seed: int) -> Tensor:
    """Draws indices, each once before any comes again; int64 [wanted]."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(passes)[:wanted]


def _divergence(model: Model, text: Tensor, dense: Tensor) -> Tensor:
    """Mean KL of the two distributions over the tokens of [B, T], in nats."""
    with fast_products():
        logits = LayerForward(model.config, 1).logits(model.hidden(text), model.final_norm, model.head)
        with torch.no_grad():
            wanted = LayerForward(model.config, 1).logits(dense, model.final_norm, model.head)
    return F.kl_div(
        logits.log_softmax(-1).flatten(0, 1),
        wanted.log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
