"""A pruned model behind HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.config import Settings
from curkv.models.pruning.prune import PruneOptions, prune
from curkv.models.pruning.source import Source
from curkv.server.run import build_client
from tests.server.scripted import running, word_tokenizer

PROMPT = [5, 9, 33, 60, 7, 12]
SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models")
    AutoModelForCausalLM.from_config(SHAPE).save_pretrained(directory / "base")
    word_tokenizer().save(str(directory / "base/tokenizer.json"))
    options = PruneOptions("magnitude", 0.25, align=8)
    prune(Source(directory / "base"), "words", directory / "pruned", options, lambda *_: None)
    return directory / "pruned"


async def test_a_pruned_model_is_served_and_named_as_one(pruned: Path) -> None:
    settings = Settings(
        model=str(pruned), kv_cache_memory=8 << 20, kv_dtype="float32", kernels="reference", weights="float32"
    )
    client = build_client(settings)
    with running(client, settings) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            [card] = (await http.get("/v1/models")).json()["data"]
            body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body | {"return_token_ids": True})
    client.stop()
    assert card["pruning"] == {"method": "magnitude", "removed": 0.25, "base": "words"}
    reference = AutoModelForCausalLM.from_pretrained(pruned)
    assert card["weights_bytes"] == sum(parameter.numel() * 4 for parameter in reference.parameters())
    reference.generation_config.eos_token_id = None
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
    assert answer.json()["choices"][0]["token_ids"] == expected[0, len(PROMPT) :].tolist()
