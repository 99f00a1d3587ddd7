"""Each family against transformers: logits, and greedy tokens through the engine."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.models.errors import UnsupportedModel
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from curkv.ranks import ALONE, Ranks
from tests.engine.conftest import request, run, tokens
from tests.models.test_llama import SHAPE

Saved = tuple[PreTrainedModel, Path]
POLICIES = ("curdkv", "snapkv", "expected-attention", "compactor", "dapq")

IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = SHAPE | IDS
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 4.0,
}

EXPERTS: dict[str, Any] = BASE | {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}

MODELS: dict[str, PreTrainedConfig] = {
    "granite": GraniteConfig(**BASE, **MULTIPLIERS, attention_bias=True, mlp_bias=True),
    "granite-tied": GraniteConfig(**BASE, **MULTIPLIERS, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**BASE, attention_bias=True),
    "olmo3": Olmo3Config(**BASE, sliding_window=256, rope_parameters=YARN),
    "smollm3": SmolLM3Config(**BASE | {"num_hidden_layers": 5}),
    "phi3": Phi3Config(**BASE),
    "phi4-mini": Phi3Config(
        **BASE | {"hidden_size": 96},
        partial_rotary_factor=0.375,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=32,
        tie_word_embeddings=True,
    ),
    "glm": GlmConfig(**BASE, head_dim=16),
    "glm4": Glm4Config(**BASE, head_dim=16),
    "exaone4": Exaone4Config(**BASE, sliding_window=None, layer_types=["full_attention"] * 3),
    "exaone4-hybrid": Exaone4Config(**BASE, sliding_window=256, sliding_window_pattern=2),
    "cohere2": Cohere2Config(**BASE, sliding_window=256, layer_types=None),
    "gemma": GemmaConfig(**BASE, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **BASE | {"num_hidden_layers": 6},
        head_dim=16,
        query_pre_attn_scalar=40,
        sliding_window=256,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3-plain": Gemma3TextConfig(
        **BASE | {"num_hidden_layers": 6}, head_dim=16, query_pre_attn_scalar=16, sliding_window=256
    ),
    "mistral-yarn": MistralConfig(**BASE, sliding_window=None, head_dim=16, rope_parameters=YARN),
    "qwen2-dynamic": Qwen2Config(**BASE, rope_parameters=DYNAMIC),
    "llama-heads-of-10": LlamaConfig(**BASE | {"hidden_size": 60}, attention_bias=True),
    "glm-heads-of-6": GlmConfig(**BASE, head_dim=6, partial_rotary_factor=0.7),
    "llama-gelu": LlamaConfig(**BASE, hidden_act="gelu"),
    "mistral-window": MistralConfig(**BASE, sliding_window=21, head_dim=16),
    "qwen2-window": Qwen2Config(**BASE, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "phi3-window": Phi3Config(**BASE, sliding_window=40),
    "olmo3-window": Olmo3Config(**BASE | {"num_hidden_layers": 4}, sliding_window=9),
    "exaone4-window": Exaone4Config(**BASE, sliding_window=17, sliding_window_pattern=2),
    "cohere2-window": Cohere2Config(**BASE | {"num_hidden_layers": 4}, sliding_window=16, layer_types=None),
    "gemma2": Gemma2Config(
        **BASE,
        head_dim=16,
        query_pre_attn_scalar=40,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3-window": Gemma3TextConfig(
        **BASE | {"num_hidden_layers": 6}, head_dim=16, query_pre_attn_scalar=16, sliding_window=16
    ),
    "mixtral": MixtralConfig(**BASE, num_local_experts=5, sliding_window=21),
    "qwen2-moe": Qwen2MoeConfig(**EXPERTS, mlp_only_layers=[1]),
    "qwen3-moe": Qwen3MoeConfig(
        **BASE,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=24,
    ),
    "granite-moe": GraniteMoeConfig(**BASE, **MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(
        **BASE | {"hidden_size": 64, "intermediate_size": 96},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters=YARN | {"truncate": False},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model of each family with random weights, biases and norms, and where it is saved."""
    model = random_model(MODELS[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(scope="module")
def chunked(saved: Saved) -> Engine:
    """An engine over it that computes prompts in chunks of 32 tokens."""
    return build(saved[1], 32)


@torch.inference_mode()
def test_logits_are_those_of_transformers(saved: Saved, chunked: Engine) -> None:
    """Of every token of texts longer than windows, in chunks, and of a token that is decoded behind them."""
    model, runner = saved[0], chunked.runner
    texts = [text(length, seed) for seed, length in enumerate((131, 40))]
    expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])
    logits: list[list[Tensor]] = [[], []]
    slots = [runner.kv.add_sequence() for _ in texts]
    for index, (slot, ids) in enumerate(zip(slots, texts, strict=True)):
        for start, end in itertools.pairwise([*range(0, len(ids) - 1, 32), len(ids) - 1, len(ids)]):
            logits[index].append(runner.run([slot], [ids[start:end]], [start], [end - start]).clone())
            runner.kv.trim([slot])
        runner.kv.free(slot)
    found = torch.cat([torch.cat(parts) for parts in logits])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_greedy_tokens_are_those_of_transformers(saved: Saved, chunked: Engine) -> None:
    """In chunks and as a whole, from a prefix that is held, and beside sequences that evict."""
    model, directory = saved
    ids = text(141, 3)
    expected = generated(model, ids, 24)
    evicting = [parse_options({"policy": name, "budget": "25%"}) for name in POLICIES]
    for engine in (chunked, build(directory, 512)):
        others = [request(ids[:100], 6, f"{index}", kv) for index, kv in enumerate(evicting)]
        outputs = run(engine, request(ids, 24), *others)
        assert tokens(outputs["r", 0]) == expected
        for index in range(len(others)):
            assert len(tokens(outputs[f"{index}", 0])) == 6
        again = run(engine, request(ids, 24, "again"))["again", 0]
        assert tokens(again) == expected
        assert again[-1].cached_tokens >= 128  # more of it where the end of the first answer is held


def test_two_processes_read_what_one_does(saved: Saved) -> None:
    """The rows of some heads, and the columns that belong to them, however the checkpoint has fused them."""
    config = load_config(saved[1])
    if config.mixture is not None or config.qk_norm_whole:
        with pytest.raises(UnsupportedModel, match="are not divided"):
            Checkpoint(saved[1], config, ranks=Ranks(0, 2))
        return
    whole, *shards = (
        Checkpoint(saved[1], config, ranks=ranks).layer(1) for ranks in (ALONE, Ranks(0, 2), Ranks(1, 2))
    )
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    qkv = [count * config.padded_head_dim // 2 for count in heads]
    gate_up = [config.intermediate_size // 2] * 2
    fused = {"qkv": qkv, "qkv_bias": qkv, "gate_up": gate_up, "gate_up_bias": gate_up}
    for block in ("attention", "feed"):
        for field in fields(getattr(whole, block)):
            expected, *found = (getattr(getattr(one, block), field.name) for one in (whole, *shards))
            if expected is None:
                continue
            if field.name in fused:
                pieces = zip(*(one.split(fused[field.name]) for one in found), strict=True)
                assert torch.equal(torch.cat([*itertools.chain.from_iterable(pieces)]), expected)
            elif field.name in ("o", "down", "sinks"):
                torch.testing.assert_close(torch.cat(found, -1), expected)  # means may be subtracted
            else:
                assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


@pytest.mark.parametrize(
    "config",
    [MistralConfig(**BASE, sliding_window=80, head_dim=16), MODELS["gemma3-window"]],
    ids=["all layers", "some layers"],
)
def test_windows_go_through_forks_and_preemptions(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = random_model(config)
    model.save_pretrained(tmp_path)
    prompts = [text(60, seed) for seed in range(4)]
    engine = build(tmp_path, 32, kv_cache_memory=400 << 10, prefix_cache_memory=0)
    outputs, preemptions = {}, 0
    for index, ids in enumerate(prompts):
        engine.add(engine.plan(request(ids, 90, f"{index}", n=2)))
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
        preemptions += engine.last_stats.preemptions
    assert preemptions and engine.kv.used_pages == 0
    for index, ids in enumerate(prompts):
        expected = generated(model, ids, 90)
        assert tokens(outputs[f"{index}", 0]) == tokens(outputs[f"{index}", 1]) == expected


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2-moe", "gpt-oss", "gpt-oss-mxfp4", "gemma3-of-a-larger-model"]
)
def test_weights_are_read_in_every_form_of_checkpoint(name: str, tmp_path: Path) -> None:
    """Experts in a tensor for all of a layer, or packed in four bits; a text part under its own prefix."""
    source = {"gpt-oss-mxfp4": "gpt-oss", "gemma3-of-a-larger-model": "gemma3-window"}.get(name, name)
    model = random_model(MODELS[source])
    if name == "gpt-oss-mxfp4":
        packed = {}
        for key, tensor in model.state_dict().items():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                blocks, scales = random_mxfp4(tensor.shape[0], tensor.shape[2], tensor.shape[1])
                packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
                values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                tensor.copy_(values)
            else:
                packed[key] = tensor
        model.config.quantization_config = {"quant_method": "mxfp4"}
        model.config.save_pretrained(tmp_path)
        save_file(packed, tmp_path / "model.safetensors")
    elif name == "gemma3-of-a-larger-model":
        model.config.save_pretrained(tmp_path)
        state = {
            key.replace("model.", "model.language_model.", 1): x for key, x in model.state_dict().items()
        }
        del state["lm_head.weight"]
        save_file(
            state | {"model.vision_tower.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors"
        )
    else:
        model.save_pretrained(tmp_path, save_original_format=False)
        assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    ids = text(40, 0)
    runner = build(tmp_path, 48).runner
    logits = runner.run([runner.kv.add_sequence()], [ids], [0], [len(ids)])
    expected = model(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.03), ("int4", 0.2)])
def test_experts_take_the_formats_of_weights(weights: str, tolerance: float, tmp_path: Path) -> None:
    """All are chosen: which of them are best is a matter of rounding."""
    model = random_model(Qwen2MoeConfig(**EXPERTS | {"num_experts_per_tok": 6}, norm_topk_prob=True))
    model.save_pretrained(tmp_path)
    runner, ids = build(tmp_path, 64, weights=weights).runner, text(50, 0)
    logits = runner.run([runner.kv.add_sequence()], [ids], [0], [len(ids)])
    expected = model(torch.tensor([ids])).logits[0]
    assert (logits - expected).square().mean().sqrt() < tolerance * expected.square().mean().sqrt()


def random_mxfp4(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(122, 127, (experts, rows, columns // 32), dtype=torch.uint8)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def generated(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The tokens that transformers continues with."""
    most = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    found: list[int] = most[0, len(ids) :].tolist()
    return found


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def build(directory: Path, max_step_tokens: int, **other: Any) -> Engine:
    """The server's engine, over a float32 cache."""
    words = Tokenizer(WordLevel({str(i): i for i in range(SHAPE["vocab_size"])}, unk_token="0"))
    words.save(str(directory / "tokenizer.json"))
    options = {"kv_cache_memory": 8 << 20, "prefix_cache_memory": 2 << 20, "max_model_len": 256}
    return build_engine(
        EngineOptions(
            model=str(directory),
            kv_dtype="float32",
            page_size=16,
            max_sequences=8,
            max_step_tokens=max_step_tokens,
            **{"weights": "float32", **options, **other},
        )
    )
