"""The server over interpreted Triton kernels answers as over the CPU kernels; a random Llama on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from curkv.config import Settings
from curkv.server.run import build_client
from tests.server.scripted import running

pytestmark = pytest.mark.triton
VOCAB = 97


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 4 query and 2 KV heads of 64; the first weights are wide, so that attention is sharp."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    Tokenizer(words).save(str(directory / "tokenizer.json"))
    return directory


def answers(checkpoint: Path, kernels: str) -> list[dict[str, Any]]:
    """What a server says to a full, a compressed and a twice compressed prompt, streams and all but times."""
    settings = Settings(
        model=str(checkpoint),
        served_model_name="random",
        kernels=kernels,
        weights="float32",
        device="cpu",
        kv_dtype="float32",
        page_size=16,
        kv_cache_memory=2 << 20,
        max_step_tokens=32,
    )
    prompt = torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    body = {"model": "random", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    options: list[dict[str, Any]] = [
        {"policy": "full"},
        {"policy": "adacurdkv", "budget": "50%"},
        {
            "policy": "curdkv",
            "budget": "25%",
            "decode_budget": "14tok",
            "decode_interval": 3,
            "recent_tokens": 4,
        },
    ]
    client = build_client(settings)
    try:
        with running(client, settings) as url, httpx.Client(base_url=url, timeout=300) as http:
            found = [http.post("/v1/completions", json={**body, "kv": kv}) for kv in options]
    finally:
        client.stop()
    assert [answer.status_code for answer in found] == [200] * 3, [answer.text for answer in found]
    return [{key: answer.json()[key] for key in ("choices", "usage")} for answer in found]


def test_answers_and_their_kept_tokens_are_those_of_the_cpu_kernels(checkpoint: Path) -> None:
    expected = answers(checkpoint, "cpu")
    full, adaptive, twice = (answer["usage"]["kv"] for answer in expected)
    assert full["evicted_tokens"] == 0
    assert adaptive["kept_tokens"] == 25
    assert twice["decode_evictions"] == 2
    assert len({answer["choices"][0]["text"] for answer in expected}) == 3
    assert answers(checkpoint, "triton") == expected
