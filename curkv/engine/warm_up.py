"""Every kernel run once before requests come, so that none of them waits for a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

from tqdm import tqdm

from curkv.cache.options import EvictionOptions
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams
from curkv.kernels import compile_cache

logger = logging.getLogger(__name__)

_HALF = {"budget": "50%"}
_FEW = 4
"""Tokens of a prompt for kernels of Numba, the same for all lengths: a large model takes its time."""
_WINDOWS = (2, 4, 8, 32, 64)
"""Of windowed leverage, beside the usual 16: Triton has a variant for each power of two."""
_OBSERVED_ROWS = (16, 32, 64)
"""Queries of a KV head's group in one block, by how many observe."""


def warm_up(engine: Engine) -> None:
    """Runs what the backend compiles variants for, and forgets all that came of it.

    Numba compiles a kernel once for all arguments, so that few policies run every one. Triton compiles anew
    for other constants, types and alignments: each policy and each way of an eviction has its own.

    Raises:
        Exception: whatever a kernel raised.
    """
    ways = list(_ways(engine))
    if compile_cache.is_empty():
        logger.info("compiling the kernels, once on this machine: about a minute")
    for way in tqdm(ways, desc="compiling the kernels", disable=len(ways) == 1, leave=False):
        for request in way:
            engine.add(engine.plan(request))
        while engine.has_work:
            for output in engine.step():
                if output.problem is not None and output.problem.__cause__ is not None:
                    raise output.problem.__cause__
    engine.drop_prefixes()
    engine.step()
    engine.scheduler.pace.forget()


def _ways(engine: Engine) -> Iterator[list[Request]]:
    """Requests that run together."""
    if engine.kv.device.type == "cpu":  # Triton's interpreter compiles nothing
        usual = ("curdkv", "adacurdkv", "snapkv", "h2o", "kvzip")
        yield [_request(engine, {"policy": name} | _HALF, length=_FEW) for name in usual]
        return
    for name in policy_names():
        if name != "full":
            yield [_request(engine, {"policy": name} | _HALF)]
    for leverage in ("sketch", "norm", "exact"):
        yield [_request(engine, {"policy": "curdkv", "leverage": leverage} | _HALF)]
    for window in _WINDOWS:
        yield [_request(engine, {"policy": "curdkv", "window": window} | _HALF)]
    config = engine.runner.model.config
    for name, rows in product(("snapkv", "snapcur"), _OBSERVED_ROWS):
        budget = 4 * max(1, rows * config.num_kv_heads // config.num_heads)  # a quarter of it observes
        options = {"policy": name, "budget": budget}
        yield [_request(engine, options, length=budget + engine.kv.layout.page_size)]
    yield [_request(engine, {"policy": "snapkv", "merge": "nearest"} | _HALF)]
    yield [_request(engine, {"policy": "snapcur", "prefill": "streaming", "prefill_chunk": 16} | _HALF)]
    decoding = {"decode_budget": 16, "decode_interval": 1, "recent_tokens": 4}
    for name in ("curdkv", "h2o"):
        yield [_request(engine, {"policy": name} | _HALF | decoding, tokens=4)]
    full = {"policy": "full"}
    yield [_request(engine, full, n=2), _request(engine, full, tokens=6, id="beside")]
    yield [_request(engine, full)]  # its prefix is held now


def _request(
    engine: Engine, kv: dict[str, Any], id: str = "", tokens: int = 2, n: int = 1, length: int | None = None
) -> Request:
    """A prompt of a length, by default two pages, or as long as there is room for."""
    layout = engine.kv.layout
    room = engine.kv.num_pages // layout.num_tables * layout.page_size
    length = max(1, min(length or 2 * layout.page_size, engine.max_model_len - tokens, room - tokens))
    options: EvictionOptions = parse_options(kv)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, n=n)
    return Request(id or options.policy, [0] * length, params, options)
