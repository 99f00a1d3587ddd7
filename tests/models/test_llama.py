from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from curkv.bench import baseline
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.linear.formats import WEIGHT_FORMATS
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables
from tests.models.dense import REFERENCE, DenseAttention, DenseBatch

CPU = get_kernels("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied-biased": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-biased": Qwen3Config(**SHAPE, head_dim=32, attention_bias=True),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A small model of each family with random weights, biases and norms, and where it is saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    return model, tmp_path


def load(directory: Path, kernels: Any = CPU) -> Decoder:
    config = load_config(directory)
    return Decoder(config, Checkpoint(directory, config), kernels)


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([text])).logits[0]
    return logits


def test_every_family_agrees_with_transformers(family: tuple[PreTrainedModel, Path]) -> None:
    model, directory = family
    llama = load(directory)
    texts = [torch.randint(0, 131, (length,)).tolist() for length in (7, 1, 70)]
    logits = llama.forward(DenseBatch.of(texts, [0, 0, 0]), DenseAttention(llama.config))
    expected = torch.cat([expected_logits(model, text) for text in texts])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"], indirect=True)
def test_reference_kernels_give_the_same(family: tuple[PreTrainedModel, Path]) -> None:
    model, directory = family
    llama = load(directory, REFERENCE)
    text = list(range(30))
    logits = llama.forward(DenseBatch.of([text], [0]), DenseAttention(llama.config))
    torch.testing.assert_close(logits, expected_logits(model, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "qwen3"], indirect=True)
def test_a_text_in_chunks_gives_the_logits_of_the_whole(family: tuple[PreTrainedModel, Path]) -> None:
    model, directory = family
    llama = load(directory)
    text = torch.randint(0, 131, (40,)).tolist()
    kv = DenseAttention(llama.config)
    cuts = [0, 17, 18, 19, 40]
    chunks = [llama.forward(DenseBatch.of([text[a:b]], [a]), kv) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(chunks), expected_logits(model, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_only_the_logit_rows_come_out(family: tuple[PreTrainedModel, Path]) -> None:
    _, directory = family
    llama = load(directory)
    batch = DenseBatch.of([[5, 6, 7], [8, 9]], [0, 0])
    whole = llama.forward(batch, DenseAttention(llama.config))
    batch.logit_rows = torch.tensor([4, 2])
    torch.testing.assert_close(llama.forward(batch, DenseAttention(llama.config)), whole[[4, 2]])
    batch.logit_rows = torch.tensor([], dtype=torch.int64)
    assert llama.forward(batch, DenseAttention(llama.config)).shape == (0, 131)


def test_rope_tables_have_the_rows_asked_for(default_model_dir: Path) -> None:
    config = load_config(default_model_dir)
    cos, sin = rope_tables(config, 100)[0]
    assert cos.shape == sin.shape == (100, 32)
    assert cos.dtype == torch.float32
    full, _ = rope_tables(config)[0]
    assert full.shape == (8192, 32)
    torch.testing.assert_close(full[:100], cos, rtol=0, atol=0)


def test_default_model_agrees_with_transformers_on_text(default_model_dir: Path) -> None:
    text = (
        "Water boils at 100 degrees Celsius at sea level. At higher altitudes the air pressure is lower, so "
        "water boils at a lower temperature, and food takes longer to cook.\n\n"
        "def mean(values):\n    return sum(values) / len(values)\n"
    )
    ids = load_tokenizer(default_model_dir).encode(text).ids
    model = baseline.load(default_model_dir)
    llama = load(default_model_dir)
    logits = llama.forward(DenseBatch.of([ids], [0]), DenseAttention(llama.config))
    expected = expected_logits(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert loss < 3.5, "the weights or the tokenizer do not belong together"


@pytest.mark.parametrize(("rounding", "most"), [("int8", 0.05), ("int4", 0.3)])
def test_rounded_weights_change_the_logits_little_and_the_head_keeps_a_byte(
    rounding: str, most: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shape = load_config(tmp_path)
    exact, rounded = (
        Decoder(shape, Checkpoint(tmp_path, shape), REFERENCE, WEIGHT_FORMATS[name])
        for name in ("float32", rounding)
    )
    assert (exact.weights, rounded.weights) == ("float32", rounding)
    vocabulary, hidden = SHAPE["vocab_size"], SHAPE["hidden_size"]
    assert "embedding" not in rounded.weights_bytes, "it is the head's memory"
    assert exact.weights_bytes["head"] == 4 * vocabulary * hidden
    assert rounded.weights_bytes["head"] == vocabulary * (hidden + 4)
    batch = DenseBatch.of([list(range(50))], [0])
    expected, actual = (model.forward(batch, DenseAttention(shape)) for model in (exact, rounded))
    assert 0 < (actual - expected).norm() < most * expected.norm()
