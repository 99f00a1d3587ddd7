"""Engines for a GPU that is met for the first time, and what they answer and keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.cache.sizing import num_pages_for
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.engine import Engine
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.engine.types import Request, SamplingParams
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import BFLOAT16, FLOAT32, WeightFormat
from curkv.kernels.spec import ModelShape
from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder, Weights
from curkv.models.info import ModelInfo
from curkv.models.loading import load_config, load_tokenizer
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables

Kept = list[list[set[int]]]
"""Positions that each head held: of every sequence that was seen after an eviction, of every head."""

FORMS = {"float32": FLOAT32, "bfloat16": BFLOAT16}


class RandomWeights:
    """Weights of a model's shape, made on the device."""

    def __init__(self, config: ModelConfig, device: str):
        self._config, self._device = config, device
        self.embedding = self.head = self._weight(config.vocab_size, config.hidden_size)
        self.final_norm = self._weight(config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        c = self._config
        return LayerWeights(
            AttentionWeights(
                norm=self._weight(c.hidden_size),
                qkv=self._weight(c.q_size + 2 * c.num_kv_heads * c.head_dim, c.hidden_size),
                o=self._weight(c.hidden_size, c.q_size),
            ),
            MlpWeights(
                norm=self._weight(c.hidden_size),
                gate_up=self._weight(2 * c.intermediate_size, c.hidden_size),
                down=self._weight(c.hidden_size, c.intermediate_size),
            ),
        )

    def attention_output(self, index: int) -> Tensor:
        return self._weight(self._config.hidden_size, self._config.q_size)

    def _weight(self, *shape: int) -> Tensor:
        weight = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
        return weight.mul_(shape[-1] ** -0.5)


def read_engine(directory: Path, kernels: str, device: str, dtype: str, pages: int = 3000) -> Engine:
    """The model in a directory; decode steps are captured where there are CUDA graphs."""
    config, form = load_config(directory), FORMS[dtype]
    weights = Checkpoint(directory, config, form.dtype, torch.device(device))
    tokens = min(2048, config.max_positions)
    layout = CacheLayout(
        full_attention(config.num_layers, config.num_kv_heads),
        config.head_dim,
        64,
        get_format(dtype),
        4,
        tokens,
    )
    return _engine(config, weights, kernels, form, layout, pages, device, 512, load_tokenizer(directory))


def random_engine(
    shape: ModelShape,
    device: str,
    batch: int,
    tokens: int,
    num_bytes: int,
    chunk: int = 2048,
    form: WeightFormat = BFLOAT16,
    kv_dtype: str = "bfloat16",
) -> Engine:
    """A model of this shape with 32,000 words and random weights."""
    config = ModelConfig(
        "LlamaForCausalLM", 32_000, shape.hidden, shape.intermediate, shape.layers, shape.query_heads,
        shape.kv_heads, shape.head_dim, tokens, 1e-5, 500_000.0, None, False, False, False, False, True,
        None, (),
    )  # fmt: skip
    layout = CacheLayout(
        full_attention(shape.layers, shape.kv_heads),
        shape.head_dim,
        64,
        get_format(kv_dtype),
        batch,
        tokens,
    )
    words = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    pages = num_pages_for(num_bytes, layout)
    weights = RandomWeights(config, device)
    return _engine(config, weights, "triton", form, layout, pages, device, chunk, words)


def _engine(
    config: ModelConfig,
    weights: Weights,
    kernels_name: Any,
    form: WeightFormat,
    layout: CacheLayout,
    pages: int,
    device: str,
    chunk: int,
    tokenizer: Tokenizer,
) -> Engine:
    kernels = get_kernels(kernels_name, device)
    model = Decoder(config, weights, kernels, form)
    kv = PageManager(layout, pages, kernels, device, pages // 8)
    attention = PagedAttention(kv, rope_tables(config, layout.max_tokens), model.output_projection)
    replay = None
    if device == "cuda" and kernels.backend.replay == "cuda graph":
        replay = Replay(model, attention, CudaGraphs())
        replay.prepare()
    return Engine(Runner(model, attention, replay), ModelInfo(tokenizer), chunk, layout.max_tokens)


def generate(
    engine: Engine,
    prompts: Sequence[list[int]],
    options: dict[str, Any],
    tokens: int = 6,
    explain: Sequence[dict[str, Any]] = (),
    **sampling: Any,
) -> tuple[dict[str, list[int]], Kept]:
    """Runs prompts together, greedily unless `sampling` says otherwise.

    Returns:
        Tokens by prompt, and what was kept after each step that evicted.

    Raises:
        RuntimeError: a request ended in an error, or the books of the cache are wrong at the end.
    """
    for i, prompt in enumerate(prompts):
        wanted: dict[str, Any] = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | sampling
        explained = tuple(map(parse_options, explain))
        request = Request(str(i), prompt, SamplingParams(**wanted), parse_options(options), explained)
        engine.add(engine.plan(request))
    found: dict[str, list[int]] = {}
    kept: Kept = []
    while engine.has_work:
        for output in engine.step():
            if output.problem is not None:
                raise RuntimeError(str(output.problem)) from output.problem.__cause__
            found.setdefault(f"{output.request_id}.{output.index}", []).extend(output.token_ids)
        if engine.last_stats.evictions:
            for slot in engine.kv.active_slots:
                view = engine.runner.attention.view(slot)
                positions = view.gather(view.pages.position, -1).cpu().flatten(0, 1).tolist()
                kept.append([set(row) - {-1} for row in positions])
    engine.check_integrity()
    return found, kept


def overlap(one: Kept, other: Kept) -> float:
    """Mean Jaccard index of what the heads kept; 1 if nothing was evicted."""
    pairs = [pair for a, b in zip(one, other, strict=False) for pair in zip(a, b, strict=False)]
    return mean(len(a & b) / max(1, len(a | b)) for a, b in pairs) if pairs else 1.0
