"""Nothing is compiled while requests run: all that Triton makes variants for has been run before.

Triton's interpreter knows no variants, so the tests run in a process that does without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from curkv.cache.policies import policy_names
from curkv.engine.warm_up import warm_up

from .fake_cuda import fake_cuda, load_guard, pretend_a_gpu
from .test_fake_cuda import ask, make_engine, run

pytestmark = pytest.mark.triton

INTERPRETED = triton.knobs.runtime.interpret
compiles = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter knows no variants")

QUARTER = {"budget": "25%"}


@pytest.mark.skipif(not INTERPRETED, reason="this is that process")
def test_the_tests_below_pass_where_triton_compiles() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 passed" in done.stdout or "skipped" in done.stdout.splitlines()[-1]


@compiles
def test_nothing_is_compiled_after_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_guard(tmp_path)
    pretend_a_gpu(monkeypatch)
    with fake_cuda(monkeypatch) as cuda:
        cuda.integer = 1  # what a head keeps, at least of the shortest prompt
        engine = make_engine(cuda, prefix_pages=60)
        warm_up(engine)
        warmed = set(cuda.variants)
        assert len(warmed) > 20
        new: dict[str, list[Any]] = {}
        for name, requests in workload():
            known = set(cuda.variants)
            run(engine, *requests)
            if cuda.variants - known:
                new[name] = sorted(cuda.variants - known)
        assert not new


def workload() -> Any:
    """Prompts of many lengths, every policy, mixed steps, forks, prefixes and evictions while decoding."""
    for length in range(17, 220, 29):
        yield f"snapkv {length}", [ask({"policy": "snapkv"} | QUARTER, 2, length=length)]
    for length in (1, 31):
        yield f"snapcur {length}", [ask({"policy": "snapcur"} | QUARTER, 2, length=length)]
    for name in policy_names():
        options = {} if name == "full" else QUARTER
        yield name, [ask({"policy": name} | options, 2, length=75)]
    for window in (2, 20):
        yield f"window {window}", [ask({"policy": "curdkv", "window": window} | QUARTER, 2, length=60)]
    full = {"policy": "full"}
    yield (
        "mixed",
        [ask(full, 9, "a", 5), ask(full, 3, "b", 150), ask({"policy": "adacurdkv"} | QUARTER, 3, "c", 99)],
    )
    yield "forks", [ask(full, 5, "n", 47, n=3), ask(full, 5, "m", 33)]
    merged = {"policy": "snapkv", "merge": "nearest"} | QUARTER
    yield "merged", [ask(merged, 2, length=90)]
    yield (
        "streamed",
        [ask({"policy": "snapcur", "prefill": "streaming", "prefill_chunk": 32} | QUARTER, 2, length=140)],
    )
    decoding = {"decode_budget": 24, "decode_interval": 2, "recent_tokens": 4}
    for name in ("h2o", "tova", "curdkv", "snapkv"):
        yield f"{name} decoding", [ask({"policy": name} | QUARTER | decoding, 12, length=50)]
    yield "sampling", [ask(full, 3, temperature=0.7, top_p=0.9, top_k=5, logprobs=2, repetition_penalty=1.1)]
