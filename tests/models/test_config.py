from typing import Any

import pytest

from curkv.models.config import SUPPORTED_ARCHITECTURES, Llama3Scaling, ModelConfig
from curkv.models.errors import UnsupportedModel


def raw(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    base = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    return base | changes


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_plain_llama() -> None:
    config = ModelConfig.from_dict(raw(rope_theta=5e5, tie_word_embeddings=True))
    assert (config.head_dim, config.q_size, config.kv_size) == (16, 64, 32)
    assert config.rope_theta == 5e5
    assert config.rope_scaling is None
    assert config.tie_embeddings
    assert config.eos_token_ids == (2,)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_llama3_scaling_in_the_forms_of_transformers_4_and_5(form: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw(**form))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_missing_optional_keys_mean_what_transformers_assumes() -> None:
    content = raw()
    for key in ("num_key_value_heads", "bos_token_id", "eos_token_id", "hidden_act", "rms_norm_eps"):
        del content[key]
    config = ModelConfig.from_dict(content)
    assert config.num_kv_heads == 4
    assert config.rope_theta == 10000.0
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_families_differ_in_biases_and_norms() -> None:
    qwen2 = ModelConfig.from_dict(raw("Qwen2ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_dict(raw("Qwen3ForCausalLM"))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
    llama = ModelConfig.from_dict(raw(attention_bias=True, mlp_bias=True, eos_token_id=[2, 3]))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    assert llama.eos_token_ids == (2, 3)


@pytest.mark.parametrize(
    "content", [raw("GPT2LMHeadModel"), raw() | {"architectures": None, "model_type": "gpt2"}]
)
def test_other_architectures_are_refused_with_a_list_of_the_supported_ones(content: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        ModelConfig.from_dict(content)
    for name in SUPPORTED_ARCHITECTURES:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw("MistralForCausalLM", sliding_window=4096), "sliding_window = 4096"),
        (raw("Qwen2ForCausalLM", use_sliding_window=True), "use_sliding_window"),
        (raw(hidden_act="gelu"), "supported: silu"),
        (raw(rope_scaling={"type": "yarn", "factor": 4.0}), "rope type yarn; supported: default, llama3"),
        (raw(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "rope type linear"),
        (raw(rope_scaling={"rope_type": "llama3"}), "factor"),
        (raw(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (raw(num_key_value_heads=3), "num_key_value_heads"),
        (raw(head_dim=15), "head_dim"),
        (raw(hidden_size=None), "hidden_size"),
        (raw(quantization_config={"quant_method": "gptq"}), "gptq"),
    ],
)
def test_unsupported_settings_are_refused_by_name(content: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_dict(content)


def test_mistral_with_full_attention_is_accepted() -> None:
    assert ModelConfig.from_dict(raw("MistralForCausalLM")).architecture == "MistralForCausalLM"
