"""Recorded decode steps give bit for bit what the kernels give one by one."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.engine.recorded_decodes import RecordedDecodes
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import WEIGHT_FORMATS
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables

from .conftest import Loaded, request, tokens

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 52,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, attention_bias=True),
}


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_recorded(
    family: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    config, kernels = load_config(tmp_path), get_kernels("cpu")
    model = Decoder(config, Checkpoint(tmp_path, config), kernels, WEIGHT_FORMATS[form])
    layout = CacheLayout(
        full_attention(config.num_layers, config.num_kv_heads),
        config.head_dim,
        16,
        get_format("float16"),
        4,
        128,
    )
    caches = [PageManager(layout, 64, kernels) for _ in range(2)]
    attention, other = (PagedAttention(kv, rope_tables(config, 128)) for kv in caches)
    slots = [[kv.add_sequence() for _ in range(3)] for kv in caches]
    decodes = RecordedDecodes(model, attention)
    for step in range(40):
        count = 3 if step % 4 else 2
        for kv, rows in zip(caches, slots, strict=True):
            kv.extend(rows[:count], [1] * count)
        ids = torch.randint(config.vocab_size, (count, 1)).tolist()
        batch = Batch.build(slots[0][:count], ids, [step] * count)
        expected = model.forward(Batch.build(slots[1][:count], ids, [step] * count), other)
        assert torch.equal(decodes.forward(batch), expected)
    assert not caplog.records


def test_an_engine_that_records_gives_the_same_tokens(loaded: Loaded) -> None:
    """Sequences of different lengths come and go, evict, and share steps with prompts."""
    choices = [{"policy": "full"}, {"policy": "curdkv", "budget": "50%"}, {"policy": "snapkv", "budget": 200}]

    def produced(recorded: bool) -> dict[str, list[int]]:
        engine = loaded.engine(recorded=recorded)
        result: dict[str, list[int]] = {}
        waiting = [
            request(loaded.text_ids[100 * i :][: 90 + 211 * i], 6 + 5 * i, id=str(i), kv=parse_options(kv))
            for i, kv in enumerate(choices)
        ]
        while waiting or engine.has_work:
            if waiting:
                item = waiting.pop()
                engine.add(engine.plan(item))
            for output in engine.step():
                result.setdefault(output.request_id, []).extend(tokens([output]))
        return result

    assert produced(True) == produced(False)


def test_what_cannot_be_recorded_is_run_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    layout = CacheLayout(full_attention(1, 1), 8, 16, get_format("float32"), 4, 64)
    kv = PageManager(layout, 8, get_kernels("cpu"))
    attention = PagedAttention(kv, (torch.ones(64, 4), torch.zeros(64, 4)))
    computed = SimpleNamespace(forward=lambda batch, _: batch.token_ids[:, None].float() + 1)
    decodes = RecordedDecodes(computed, attention)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for token in (5, 7):
            batch = Batch.build([0], [[token]], [0])
            assert decodes.forward(batch).tolist() == [[token + 1]]
    assert len(caplog.records) == 1


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    """It would take 100 MB, as much as the model."""
    script = (
        "import sys, torch, curkv.engine.build\n"
        "from curkv.engine.recorded_decodes import _LaunchesOnly\n"
        "with _LaunchesOnly(): torch.empty(1)\n"
        "assert not {'torch._dynamo', 'triton', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
