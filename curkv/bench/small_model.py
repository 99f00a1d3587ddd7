"""A small random Llama in a directory: it is served like any other, and answers within milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from curkv.bench.text import documentation_text
from curkv.models.families import family_of, read_config

SPECIAL_TOKENS = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def write_small_model(directory: Path) -> None:
    """Writes configuration, weights, and a tokenizer of the documentation's commonest pieces.

    Weights are random and always the same, and so large that attention is far from uniform and the likeliest
    token is seldom nearly tied.

    Args:
        directory: exists and is empty.
    """
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config, generator = read_config(CONFIG), torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) * (1 if "embed" in name else shape[-1] ** -0.5)
        if len(shape) > 1
        else torch.ones(shape)
        for name, shape in family_of(config).tensors(config).items()
    }
    save_file(weights, directory / "model.safetensors")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([documentation_text()[:100_000]], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"eos_token": SPECIAL_TOKENS[-1], "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
