"""Each family against transformers: logits, and greedy tokens through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
)

from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.kernels.dispatch import get_kernels
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from tests.engine.conftest import request, run, tokens
from tests.models.dense import DenseAttention, DenseBatch
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
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model of each family with random weights, biases and norms, and where it is saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


@torch.inference_mode()
def test_logits_are_those_of_transformers(saved: Saved) -> None:
    model, directory = saved
    config = load_config(directory)
    decoder = Decoder(config, Checkpoint(directory, config), get_kernels("cpu"))
    texts = [text(length, seed) for seed, length in enumerate((70, 40))]
    logits = decoder.forward(DenseBatch.of(texts, [0, 0]), DenseAttention(config))
    expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_greedy_tokens_are_those_of_transformers(saved: Saved) -> None:
    """In chunks and as a whole, from a prefix that is held, and beside sequences that evict."""
    model, directory = saved
    ids = text(77, 3)
    most = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = most[0, len(ids) :].tolist()
    evicting = [parse_options({"policy": name, "budget": "50%"}) for name in POLICIES]
    for chunk in (32, 512):
        engine = build(directory, chunk)
        others = [request(ids[:60], 6, f"{index}", kv) for index, kv in enumerate(evicting)]
        outputs = run(engine, request(ids, 12), *others)
        assert tokens(outputs["r", 0]) == expected
        for index in range(len(others)):
            assert len(tokens(outputs[f"{index}", 0])) == 6
        again = run(engine, request(ids, 12, "again"))["again", 0]
        assert tokens(again) == expected
        assert again[-1].cached_tokens == 64


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def build(directory: Path, max_step_tokens: int) -> Engine:
    """The server's engine, over a float32 cache."""
    words = Tokenizer(WordLevel({str(i): i for i in range(SHAPE["vocab_size"])}, unk_token="0"))
    words.save(str(directory / "tokenizer.json"))
    options = {"kv_cache_memory": 4 << 20, "prefix_cache_memory": 1 << 20, "max_model_len": 256}
    return build_engine(
        EngineOptions(
            model=str(directory),
            weights="float32",
            kv_dtype="float32",
            page_size=16,
            max_sequences=8,
            max_step_tokens=max_step_tokens,
            **options,
        )
    )
