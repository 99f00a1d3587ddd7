"""GGUF files of each family, named as the `gguf` package does, against the model that they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import Gemma2Config, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from curkv.models.families import family_of_gguf
from curkv.models.loading.gguf import describe_gguf
from tests.models.test_gguf import permute
from tests.models.test_llama import SHAPE
from tests.models.test_model_families import BASE, EXPERTS, MODELS, build, random_model, text
from tests.models.test_tokenizer import byte_level_metadata


def granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def longrope(writer: GGUFWriter, config: Any) -> None:
    scaling = config.rope_parameters
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    for kind in ("long", "short"):
        factors = np.array(scaling[f"{kind}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    ratio = config.max_position_embeddings / scaling["original_max_position_embeddings"]
    amplitude = np.sqrt(1 + np.log(ratio) / np.log(scaling["original_max_position_embeddings"]))
    writer.add_rope_scaling_attn_factors(float(amplitude))


def window(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def pattern(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def cohere(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_logit_scale(config.logit_scale)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def caps(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def clamped(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def experts(writer: GGUFWriter, config: Any) -> None:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "embedding_multiplier"):
        granite(writer, config)


CASES: dict[str, tuple[str, Callable[[GGUFWriter, Any], None] | None]] = {
    "granite-tied": ("granite", granite),
    "olmo2": ("olmo2", None),
    "smollm3": ("smollm3", None),
    "phi3": ("phi3", None),
    "phi4-mini": ("phi3", longrope),
    "glm4": ("glm4", None),
    "exaone4": ("exaone4", None),
    "exaone4-hybrid": ("exaone4", pattern),
    "cohere2": ("cohere2", cohere),
    "gemma": ("gemma", None),
    "gemma2": ("gemma2", caps),
    "gemma3-plain": ("gemma3", window),
    "mixtral": ("llama", experts),
    "qwen2-moe": ("qwen2moe", experts),
    "qwen3-moe": ("qwen3moe", experts),
    "granite-moe": ("granitemoe", experts),
    "gpt-oss": ("gpt-oss", clamped),
}
CONFIGS = MODELS | {
    "gemma2": Gemma2Config(
        **BASE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "mixtral": MixtralConfig(**BASE, num_local_experts=5),
    "qwen2-moe": Qwen2MoeConfig(**EXPERTS),
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, head_dim=16, norm_topk_prob=True),
}
"""Files say nothing of some windows, nor of layers without experts."""


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_it_came_from(name: str, tmp_path: Path) -> None:
    architecture, write = CASES[name]
    model = random_model(CONFIGS[name])
    write_gguf(tmp_path / "a.gguf", architecture, model, write)
    describe_gguf(tmp_path / "a.gguf", tmp_path)
    runner, ids = build(tmp_path, 64).runner, text(50, 0)
    logits = runner.run([runner.kv.add_sequence()], [ids], [0], [len(ids)])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def write_gguf(
    path: Path, architecture: str, model: PreTrainedModel, write: Callable[[GGUFWriter, Any], None] | None
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    tokens = byte_level_metadata("qwen2", SHAPE["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens["tokenizer.ggml.tokens"])
    writer.add_token_types(tokens["tokenizer.ggml.token_type"])
    writer.add_token_merges(tokens["tokenizer.ggml.merges"])
    if write is not None:
        write(writer, config)
    number = next(id for id, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        if family_of_gguf(architecture).gguf_interleaved and ("q_proj" in name or "k_proj" in name):
            kind = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = permute(rows, kind)
        if architecture.startswith("gemma") and "norm" in name:
            rows = rows + 1
        if ".experts." in name or ".block_sparse_moe.input" in name or ".block_sparse_moe.output" in name:
            for part, stack in stacks(name, rows, turned=architecture == "gpt-oss").items():
                found = f"blk.{name.split('.')[2]}.ffn_{part}"
                writer.add_tensor(found, np.ascontiguousarray(stack))
            continue
        if "shared_expert_gate" in name:
            rows = rows[0]
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if found.endswith("attn_sinks"):
            found += ".weight"
        writer.add_tensor(found, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacks(name: str, rows: Any, turned: bool) -> dict[str, Any]:
    """What files hold of a stack of experts; those of gpt-oss are turned, and gate and up take turns."""
    kind = "bias" if name.endswith("_bias") else "weight"
    if turned and kind == "weight":
        rows = rows.swapaxes(1, 2)
    if "down_proj" in name or "output_linear" in name:
        return {f"down_exps.{kind}": rows}
    half = rows.shape[1] // 2
    gate, up = (rows[:, ::2], rows[:, 1::2]) if turned else (rows[:, :half], rows[:, half:])
    return {f"gate_exps.{kind}": gate, f"up_exps.{kind}": up}
