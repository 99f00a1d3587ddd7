"""Whole requests over caches of integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from curkv.cache.parsing import parse_options
from curkv.engine.engine import Engine

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
OPTIONS = {
    "curdkv": {"policy": "curdkv", "budget": "25%"},
    "sketch": {"policy": "curdkv", "budget": "25%", "leverage": "sketch", "decode_budget": "80"},
    "snapcur": {"policy": "snapcur", "budget": "25%"},
    "h2o": {"policy": "h2o", "budget": "25%", "decode_budget": "80", "decode_interval": "4"},
    "compactor": {"policy": "compactor", "budget": "25%", "allocation": "adaptive"},
    "merged": {"policy": "knorm", "budget": "25%", "merge": "nearest"},
    "streaming": {"policy": "curdkv", "budget": "80", "prefill": "streaming", "prefill_chunk": "100"},
    "kvpress": {"policy": "kvpress:KeyDiffPress", "budget": "25%"},
}


BYTES = {"int8": 2 * 64 + 2 * 4, "k8v4": 64 + 4 + 32 + 2 * 4, "int4": 2 * 32 + 4 * 4}
SOME = ("curdkv", "h2o", "merged", "streaming")


@pytest.mark.parametrize(
    ("kv_dtype", "name"),
    [*(("int8", name) for name in OPTIONS), *(("k8v4", name) for name in SOME), ("int4", "sketch")],
)
def test_policies_and_options_work_and_bytes_count_the_scales(
    make_engine: MakeEngine, loaded: Loaded, kv_dtype: str, name: str
) -> None:
    engine = make_engine(kv_dtype=kv_dtype)
    item = request(loaded.prompt(320), 12, kv=parse_options(OPTIONS[name]), n=2)
    outputs = run(engine, item)
    layout = engine.kv.layout
    assert layout.page_bytes == 32 * (BYTES[kv_dtype] + 16)
    for choice in outputs.values():
        report = choice[-1].kv
        assert report is not None and report.kept_tokens <= 81
        assert report.bytes % layout.page_bytes == 0
        assert report.bytes <= layout.page_bytes * layout.num_heads * 5
        assert len(tokens(choice)) == 12


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 4), ("k8v4", 3)])
def test_answers_are_those_of_a_float_cache_almost_always(
    make_engine: MakeEngine, loaded: Loaded, kv_dtype: str, most: int
) -> None:
    prompts = [request(loaded.prompt(200 + 31 * i, 50 * i), 8, f"r{i}") for i in range(6)]
    exact, rounded = (run(make_engine(kv_dtype=name), *prompts) for name in ("float32", kv_dtype))
    equal = sum(tokens(exact[key]) == tokens(rounded[key]) for key in exact)
    assert equal >= most
