"""From a model's name and a handful of numbers to an engine that is ready to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import curkv
from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, LayerSpec
from curkv.cache.page_manager import PageManager
from curkv.cache.sizing import num_pages_for
from curkv.cache.store import Store
from curkv.config import EngineOptions
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.device import choose_device
from curkv.engine.engine import Engine
from curkv.engine.lockstep import Followers, LeadingEngine, Start, meeting_place
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.engine.warm_up import warm_up
from curkv.kernels.cpu.cores import usable_cores
from curkv.kernels.dispatch import get_kernels
from curkv.models.chat_template import load_chat_template, load_eos_token
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.loading import load_config, load_pruning, load_tokenizer, resolve_model
from curkv.models.loading.fingerprint import fingerprint
from curkv.models.loading.packed import load_decoder
from curkv.models.rope import rope_tables
from curkv.models.shards import shard_of
from curkv.ranks import ALONE, Group, Ranks
from curkv.units import format_size

PREFIX_SHARE = 1 / 8
"""Share of the cache that prefixes of prompts may take by default.

What is cached gives way to running sequences, so it costs them nothing; but a cached page is memory that
the process has touched and that an eviction does not free.
"""


def build_engine(options: EngineOptions, when_loaded: Callable[[Engine], None] | None = None) -> Engine:
    """Loads a model and gives it a cache, in this process or in several of which this is the first.

    Args:
        options: of the engine.
        when_loaded: is given the engine before its kernels are warmed up.

    Raises:
        ModelError: the model cannot be found or is not supported.
        ValueError: the cache cannot hold a single page per KV head, max_model_len exceeds the model's, the
            device has no weights of the type, or heads are too odd for the cache's format.
        EngineBroken: another process has ended.
    """
    if options.tensor_parallel == 1:
        return _made_ready(*_assembled(options, ALONE, Engine), when_loaded)
    _check_shared(options)
    with meeting_place() as meeting:
        followers = Followers.start(options, Path(meeting, "ranks"))
        try:
            ranks = _joined(Start(options, 0, Path(meeting, "ranks")))
            return _made_ready(*_assembled(options, ranks, partial(LeadingEngine, followers)), when_loaded)
        except BaseException:
            followers.end()
            raise


def _check_shared(options: EngineOptions) -> None:
    """Refuses what several processes cannot do together, before any is started."""
    shard_of(
        load_config(resolve_model(options.model), options.text_only), Ranks(size=options.tensor_parallel)
    )
    device = choose_device(options.device)
    if options.prefix_store is not None:
        raise ValueError("--tensor-parallel does without --prefix-store")
    if device.kind == "cuda" and (found := torch.cuda.device_count()) < options.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {options.tensor_parallel} needs as many GPUs; torch sees {found}"
        )


def build_follower(start: Start) -> Engine:
    """Builds what a process other than the first has of an engine; raises what `build_engine` does."""
    return _assembled(start.options, _joined(start), Engine)[0]


def _joined(start: Start) -> Ranks:
    device = choose_device(start.options.device).torch
    if device.type == "cuda":
        device = torch.device("cuda", start.rank)
        torch.cuda.set_device(device)
    return Group(start.rank, start.options.tensor_parallel, start.meeting, device)


def _assembled(
    options: EngineOptions, ranks: Ranks, make: Callable[..., Engine]
) -> tuple[Engine, Store | None]:
    """Loads what a process has of a model, and gives it a cache.

    Args:
        options: of the engine.
        ranks: the processes.
        make: the engine of its parts.

    Returns:
        The engine, and where its prefixes are to outlive it.
    """
    cores = max(1, usable_cores() // ranks.size)
    threads = options.threads or min(torch.get_num_threads(), cores)
    torch.set_num_threads(threads)
    directory = resolve_model(options.model)
    config = load_config(directory, options.text_only)
    max_model_len = _max_model_len(options.max_model_len, config)
    rope = rope_tables(config, max_model_len)
    device = choose_device(options.device)
    kernels = get_kernels(options.kernels, device.torch)
    if (options.threads is not None or ranks.size > 1) and kernels.backend.name == "cpu":
        from curkv.kernels.cpu.threads import THREADS  # Numba, which a GPU needs not

        THREADS.set(threads)
    form = device.weight_format(options.weights)
    max_step_tokens = options.max_step_tokens or device.max_step_tokens
    model = load_decoder(directory, config, kernels, form, device.torch, ranks)
    layout = CacheLayout(
        layers=_layers(config, max_model_len),
        head_dim=config.padded_head_dim,
        page_size=options.page_size,
        format=device.kv_format(options.kv_dtype, config.padded_head_dim, form),
        max_sequences=options.max_sequences or device.most_sequences,
        max_tokens=max_model_len,
        max_step_tokens=max_step_tokens,
        shards=ranks.size,
    )
    num_bytes = options.kv_cache_memory
    if num_bytes is None:
        free = min(device.cache_bytes, device.free_memory - _peak_bytes(config, layout, max_step_tokens))
        [num_bytes] = ranks.told([free * (ranks.size if device.kind == "cuda" else 1)])
    prefix_bytes = options.prefix_cache_memory
    if prefix_bytes is None:
        prefix_bytes = int(num_bytes * PREFIX_SHARE)
    num_pages, prefix_pages = num_pages_for(num_bytes, layout), prefix_bytes // layout.page_bytes
    if options.max_sequences is None:
        layout = replace(layout, max_sequences=device.sequences(num_pages, layout))
    prefill_dtype = torch.bfloat16 if form.rounds else None
    try:
        kv = PageManager(layout, num_pages, kernels, device.torch, prefix_pages, ranks)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"a KV cache of {format_size(num_bytes)} is more than the memory: lower --kv-cache-memory"
        raise MemoryError(message) from error
    attention = PagedAttention(
        kv, rope, model.output_projection, prefill_dtype, config.attention_softcap, model.sinks,
        device.dense_prompts,
    )  # fmt: skip
    engine = make(
        Runner(model, attention, _replay(model, attention)),
        ModelInfo(
            load_tokenizer(directory),
            load_chat_template(directory),
            load_pruning(directory),
            load_eos_token(directory),
        ),
        max_step_tokens,
        max_model_len,
        options.max_itl,
        reuse_generated=options.prefix_cache == "generated",
        session_ttl=options.session_ttl,
    )
    if options.prefix_store is None:
        return engine, None
    arrays = [vectors.arrays(layout.head_dim) for vectors in (layout.format.keys, layout.format.values)]
    numerics = form.name, layout.format.name, arrays, layout.page_size, prefill_dtype, options.prefix_cache
    turned = [table[1].tolist() for pair in {id(pair[0]): pair for pair in rope}.values() for table in pair]
    digest = fingerprint(directory, curkv.__version__, *numerics, turned)
    return engine, Store(options.prefix_store, digest, options.prefix_store_size)


def _made_ready(engine: Engine, store: Store | None, when_loaded: Callable[[Engine], None] | None) -> Engine:
    """Warms an engine up, which drops what it has cached, and keeps on disk what it caches from then on."""
    if when_loaded is not None:
        when_loaded(engine)
    warm_up(engine)
    if engine.runner.replay is not None:
        engine.runner.replay.prepare()
    if store is not None:
        engine.keep_on_disk(store)
    return engine


def _replay(model: Decoder, attention: PagedAttention) -> Replay | None:
    """Runs decode steps again in the way that the kernels allow; not what several processes exchange."""
    kv = attention.kv
    if kv.ranks.size > 1:
        return None
    if kv.kernels.backend.replay == "launches":
        from curkv.engine.recorded_launches import RecordedLaunches  # Numba, which a GPU needs not

        return Replay(model, attention, RecordedLaunches())
    if kv.kernels.backend.replay == "cuda graph" and kv.device.type == "cuda":
        return Replay(model, attention, CudaGraphs())
    return None


def _layers(config: ModelConfig, max_model_len: int) -> tuple[LayerSpec, ...]:
    """What each layer keeps; a window that every text fits into is none."""
    windows = [config.layer(index).window for index in range(config.num_layers)]
    return tuple(
        LayerSpec(config.num_kv_heads, None if window is None or window >= max_model_len else window)
        for window in windows
    )


def _peak_bytes(config: ModelConfig, layout: CacheLayout, step_tokens: int) -> int:
    """Memory that the largest step takes beside weights and cache, by the largest of what lives at once.

    That is a layer's activations, in 2 bytes; float32 logits, adjusted and sorted; or the scores of an
    eviction from the longest text, combined and pooled.
    """
    wide = max(config.intermediate_size * 3, config.q_size + 2 * config.kv_size)
    activations = 2 * step_tokens * (wide + 4 * config.hidden_size)
    logits = 3 * 4 * layout.max_sequences * config.vocab_size
    scores = 4 * 4 * layout.num_heads * layout.max_tokens
    return activations + max(logits, scores)


def _max_model_len(asked: int | None, config: ModelConfig) -> int:
    if asked is not None and asked > config.max_positions:
        raise ValueError(f"max_model_len {asked} exceeds the model's {config.max_positions} positions")
    return asked if asked is not None else config.max_positions
