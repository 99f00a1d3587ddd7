"""From a model's name and a handful of numbers to an engine that is ready to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from numba import set_num_threads

from curkv.cache.kv_cache import CacheLayout, KVCache
from curkv.cache.sizing import default_cache_bytes, num_pages_for
from curkv.engine.engine import Engine
from curkv.kernels.dispatch import KernelsName, get_kernels
from curkv.models.config import ModelConfig
from curkv.models.llama import Llama, rope_tables
from curkv.models.loading import Checkpoint, load_config, load_tokenizer, resolve_model

KVDtype = Literal["auto", "float32", "bfloat16", "float16"]
CPU_KV_DTYPE: KVDtype = "float16"
"""Default on CPU: half the bytes of float32, eight times the precision of bfloat16 (docs/benchmarks.md)."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built from.

    Attributes:
        model: directory, Hub id, GGUF file or built-in name.
        kv_cache_bytes: size of the page pool; None takes a share of the memory that is free after loading.
        kv_dtype: type of cached keys and values.
        page_size: tokens of one KV head per page.
        max_step_tokens: most tokens of one step.
        max_sequences: most sequences in flight.
        max_model_len: most tokens of prompt and output together; None takes the model's.
        kernels: implementation of the kernels.
        threads: CPU threads; None takes all cores.
    """

    model: str
    kv_cache_bytes: int | None = None
    kv_dtype: KVDtype = "auto"
    page_size: int = 32
    max_step_tokens: int = 512
    max_sequences: int = 64
    max_model_len: int | None = None
    kernels: KernelsName = "auto"
    threads: int | None = None


def build_engine(options: EngineOptions) -> Engine:
    """Loads a model and gives it a cache.

    Raises:
        ModelError: the model cannot be found or is not supported.
        ValueError: the cache cannot hold a single page per KV head, or max_model_len exceeds the model's.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        set_num_threads(options.threads)
    directory = resolve_model(options.model)
    config = load_config(directory)
    kernels = get_kernels(options.kernels)
    model = Llama(config, Checkpoint(directory, config), kernels)
    max_model_len = _max_model_len(options.max_model_len, config)
    layout = CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=options.page_size,
        dtype=getattr(torch, CPU_KV_DTYPE if options.kv_dtype == "auto" else options.kv_dtype),
        max_sequences=options.max_sequences,
        max_tokens=max_model_len,
    )
    num_bytes = options.kv_cache_bytes if options.kv_cache_bytes is not None else default_cache_bytes()
    kv = KVCache(layout, num_pages_for(num_bytes, layout), kernels, rope_tables(config, max_model_len))
    return Engine(model, kv, kernels, load_tokenizer(directory), options.max_step_tokens, max_model_len)


def _max_model_len(asked: int | None, config: ModelConfig) -> int:
    if asked is not None and asked > config.max_positions:
        raise ValueError(f"max_model_len {asked} exceeds the model's {config.max_positions} positions")
    return asked if asked is not None else config.max_positions
