from typing import Any

import pytest

from curkv.models.errors import UnsupportedModel
from curkv.models.families import SUPPORTED_ARCHITECTURES, read_config
from curkv.models.rope import rope_tables
from curkv.models.rope_scaling import LinearScaling, Llama3Scaling


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


WINDOWS = {"sliding_window": 256, "max_window_layers": 1}


def test_plain_llama() -> None:
    config = read_config(raw(rope_theta=5e5, tie_word_embeddings=True))
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
    config = read_config(raw(**form))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_missing_optional_keys_mean_what_transformers_assumes() -> None:
    content = raw()
    for key in ("num_key_value_heads", "bos_token_id", "eos_token_id", "hidden_act", "rms_norm_eps"):
        del content[key]
    config = read_config(content)
    assert config.num_kv_heads == 4
    assert config.rope_theta == 10000.0
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_families_differ_in_biases_and_norms() -> None:
    qwen2 = read_config(raw("Qwen2ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read_config(raw("Qwen3ForCausalLM"))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
    llama = read_config(raw(attention_bias=True, mlp_bias=True, eos_token_id=[2, 3]))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    assert llama.eos_token_ids == (2, 3)


@pytest.mark.parametrize(
    "content", [raw("GPT2LMHeadModel"), raw() | {"architectures": None, "model_type": "gpt2"}]
)
def test_other_architectures_are_refused_with_a_list_of_the_supported_ones(content: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read_config(content)
    for name in SUPPORTED_ARCHITECTURES:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_lora_rank": 512, "n_routed_experts": 8}, "multi-head latent attention, mixtures of experts"),
        ({"mamba_d_state": 16}, "state-space or delta-rule layers"),
        ({"linear_num_value_heads": 4}, "state-space or delta-rule layers"),
        ({"vision_config": {}, "text_config": {"num_experts": 4}}, "vision or audio towers, mixtures of exp"),
    ],
)
def test_what_an_unknown_architecture_lacks_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"OtherForCausalLM with {words}.*; supported: LlamaFor"):
        read_config(raw("OtherForCausalLM", **settings))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw("Gemma3ForCausalLM", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (raw(hidden_act="tanh"), "supported: silu, swish, gelu"),
        (raw("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok"),
        (raw(rope_scaling={"type": "mrope", "factor": 4.0}), "rope type mrope; supported: default, linear"),
        (raw(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "factor"),
        (raw(rope_scaling={"type": "yarn"}), "factor"),
        (raw("Phi3ForCausalLM", rope_scaling={"type": "su", "long_factor": [2.0]}), "short_factor"),
        (
            raw("Phi3ForCausalLM", rope_scaling={"type": "su", "long_factor": [2.0], "short_factor": [1.0]}),
            "a number for each of 8 frequencies",
        ),
        (raw("Phi3ForCausalLM", partial_rotary_factor=0.2), "rotates 3 of 16 channels"),
        (raw("SmolLM3ForCausalLM", no_rope_layers=[1]), "no_rope_layers"),
        (raw("Olmo3ForCausalLM", layer_types=["full_attention"]), "layer_types"),
        (raw("Olmo3ForCausalLM", layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (raw(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"),
        (raw(rope_scaling={"rope_type": "llama3"}), "factor"),
        (raw(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (raw(num_key_value_heads=3), "num_key_value_heads"),
        (raw(head_dim=15), "head_dim"),
        (raw(hidden_size=None), "hidden_size"),
        (raw(hidden_size="wide"), "hidden_size = 'wide'"),
        (raw(num_hidden_layers=0), "num_hidden_layers = 0"),
        (raw(vocab_size=-1), "vocab_size = -1"),
        (raw(rms_norm_eps="small"), "rms_norm_eps = 'small'"),
        (raw(rope_scaling=[1]), "rope_scaling"),
        (raw(eos_token_id="</s>"), "eos_token_id = '</s>'"),
        (raw(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes; supported: awq, gptq"),
    ],
)
def test_unsupported_settings_are_refused_by_name(content: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read_config(content)


@pytest.mark.parametrize(
    "content",
    [
        raw("MistralForCausalLM", sliding_window=512),
        raw("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=256, max_window_layers=2),
        raw("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=512, max_window_layers=0),
        raw("Qwen2ForCausalLM", sliding_window=256),
    ],
)
def test_windows_that_hide_nothing_are_accepted(content: dict[str, Any]) -> None:
    assert read_config(content).architecture == content["architectures"][0]


@pytest.mark.parametrize(
    "content",
    [
        raw("MistralForCausalLM", sliding_window=256),
        raw("Qwen2ForCausalLM", use_sliding_window=True, **WINDOWS),
        raw("Qwen3ForCausalLM", use_sliding_window=True, **WINDOWS),
        raw("Olmo3ForCausalLM", sliding_window=256),
    ],
)
def test_windows_are_those_of_layers(content: dict[str, Any]) -> None:
    config = read_config(content)
    assert {config.layer(index).window for index in range(config.num_layers)} <= {None, 256}
    assert 256 in [config.layer(index).window for index in range(config.num_layers)]
    assert len(rope_tables(config)[0][0]) == config.max_positions


SEEING = {"vision_config": {"hidden_size": 8}, "text_config": raw() | {"model_type": "gemma3_text"}}


def test_the_text_part_of_a_model_that_sees_is_served_if_that_is_asked_for() -> None:
    content = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", **SEEING}
    with pytest.raises(UnsupportedModel, match="with vision or audio towers; --text-only serves its text"):
        read_config(content)
    assert read_config(content, text_only=True).architecture == "Gemma3ForCausalLM"
    mrope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vision_config": {}}
    older = raw("Qwen2VLForConditionalGeneration", model_type="qwen2_vl", **mrope)
    assert read_config(older, text_only=True).rope_scaling is None
    assert read_config(raw(), text_only=True) == read_config(raw())


def test_the_model_type_names_the_family_where_no_architecture_does() -> None:
    content = raw() | {"architectures": None, "model_type": "qwen3"}
    assert read_config(content).qk_norm


def test_linear_scaling_in_the_forms_of_transformers_4_and_5() -> None:
    for form in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}},
    ):
        assert read_config(raw(**form)).rope_scaling == LinearScaling(2.0)


def test_mistral_with_full_attention_is_accepted() -> None:
    assert read_config(raw("MistralForCausalLM")).architecture == "MistralForCausalLM"
