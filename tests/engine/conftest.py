"""The default model, loaded once, and engines over it with caches of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from curkv.bench.text import documentation_text
from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions
from curkv.cache.page_manager import PageManager
from curkv.engine.engine import Engine
from curkv.engine.recorded_launches import RecordedLaunches
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.engine.types import Output, Request, SamplingParams
from curkv.kernels.dispatch import Kernels, get_kernels
from curkv.kernels.formats import get_format
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.loading import load_config, load_tokenizer
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables


@dataclass(frozen=True)
class Loaded:
    """The default model and what goes with it."""

    directory: Path
    kernels: Kernels
    model: Decoder
    tokenizer: Tokenizer
    text_ids: list[int]

    def engine(
        self,
        num_pages: int = 20_000,
        page_size: int = 32,
        kv_dtype: str = "float32",
        max_step_tokens: int = 512,
        max_sequences: int = 16,
        max_model_len: int = 8192,
        max_itl: float | None = None,
        recorded: bool = True,
    ) -> Engine:
        config = self.model.config
        layout = CacheLayout(
            full_attention(config.num_layers, config.num_kv_heads),
            config.head_dim,
            page_size,
            get_format(kv_dtype),
            max_sequences,
            max_model_len,
        )
        kv = PageManager(layout, num_pages, self.kernels)
        attention = PagedAttention(kv, rope_tables(config, max_model_len), self.model.output_projection)
        replay = Replay(self.model, attention, RecordedLaunches()) if recorded else None
        runner = Runner(self.model, attention, replay)
        return Engine(runner, ModelInfo(self.tokenizer), max_step_tokens, max_model_len, max_itl)

    def prompt(self, length: int, start: int = 0) -> list[int]:
        return self.text_ids[start : start + length]


@pytest.fixture(scope="session")
def loaded(default_model_dir: Path) -> Loaded:
    config, kernels = load_config(default_model_dir), get_kernels("cpu")
    model = Decoder(config, Checkpoint(default_model_dir, config), kernels)
    tokenizer = load_tokenizer(default_model_dir)
    text_ids = tokenizer.encode(documentation_text()[:60_000]).ids
    return Loaded(default_model_dir, kernels, model, tokenizer, text_ids)


@pytest.fixture
def make_engine(loaded: Loaded) -> Callable[..., Engine]:
    return loaded.engine


def request(
    prompt: list[int],
    max_tokens: int = 8,
    id: str = "r",
    kv: EvictionOptions | None = None,
    **sampling: object,
) -> Request:
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    return Request(id, prompt, params, kv or EvictionOptions())


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[Output]]:
    """Runs requests to their end, checking the cache after every step; outputs by (request, choice)."""
    for item in requests:
        engine.add(engine.plan(item))
    outputs: dict[tuple[str, int], list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
    assert engine.kv.used_pages == 0
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
