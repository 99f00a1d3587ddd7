from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from curkv.models.pruning.source import Source

disable_progress_bar()

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied-biased": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def ignore_progress(task: str, done: int, total: int) -> None:
    pass


def save_model(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, change: Any = None
) -> Path:
    """Saves a model with random weights and biases, after `change` has had its way with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if name.endswith(("norm.weight", "bias")) else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
        if change:
            change(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Source:
    return Source(save_model(tmp_path / "base"))
