"""Prints for what the host waits on a GPU: each set of options over fake CUDA tensors, without a GPU.

    TRITON_INTERPRET=1 python -m tests.engine.waits

A row for each: how it ended, waits of a step that only decodes, waits of an eviction (of all two layers), and
launches of Triton's kernels in a decode step and layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from curkv.cache.policies import policy_names
from curkv.engine.types import Structure
from curkv.kernels.linear.formats import BFLOAT16, FP8, GPU_INT8
from curkv.tables import head, line

from .fake_cuda import FakeCuda, fake_cuda, load_guard
from .test_fake_cuda import ask, make_engine

HALF = {"policy": "snapkv", "budget": "50%"}
DECODING = {"policy": "h2o", "budget": "50%", "decode_budget": 12, "decode_interval": 2, "recent_tokens": 4}
STREAMING = {"policy": "snapkv", "budget": 20, "prefill": "streaming", "prefill_chunk": 16}
LAYERS, SAMPLE = 2, "engine.sampling.sample"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"policy": name} | ({} if name == "full" else {"budget": "50%"}), {}, {})
        for name in policy_names()
    },
    "merge nearest": (HALF | {"merge": "nearest"}, {}, {}),
    "adaptive allocation": ({"policy": "curdkv", "budget": "50%", "allocation": "adaptive"}, {}, {}),
    "evictions while decoding (h2o)": (DECODING, {"tokens": 7}, {}),
    "streaming prefill": (STREAMING, {"length": 100}, {}),
    "prefixes and forks": (HALF, {"n": 2, "temperature": 1.0, "seed": 1}, {"prefix_pages": 400}),
    "structured output": ({"policy": "full"}, {"structure": Structure("regex", "a{9}", "p")}, {}),
    "penalties, bias": ({"policy": "full"}, {"repetition_penalty": 1.1, "logit_bias": {3: 1.0}}, {}),
    "top-p, top-k": ({"policy": "full"}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}, {}),
    "logprobs": ({"policy": "full"}, {"logprobs": 3}, {}),
    "prompt_logprobs": ({"policy": "full"}, {"prompt_logprobs": 3}, {}),
    "int8 cache": (HALF, {}, {"kv_dtype": "int8"}),
    "fp8 cache": (HALF, {}, {"kv_dtype": "fp8"}),
    "fp8 weights": (HALF, {}, {"form": FP8}),
    "int8 weights": (HALF, {}, {"form": GPU_INT8}),
}  # fmt: skip


def measure(cuda: FakeCuda, kv: dict[str, Any], how: dict[str, Any], made: dict[str, Any]) -> list[object]:
    """How a request ended, and the most waits of a step and of an eviction, and launches of a step."""
    engine = make_engine(cuda, **({"form": BFLOAT16} | made))
    engine.add(engine.plan(ask(kv, **({"tokens": 4} | how))))
    steps, evictions, launches = [0], [0], [0]
    while engine.has_work:
        before, sampled, launched = cuda.waits.total(), cuda.waits[SAMPLE], cuda.launches
        for output in engine.step():
            if output.finish_reason == "error":
                cause = output.problem.__cause__ if output.problem is not None else None
                return [f"FAILED: {cause!r}", "", "", ""]
        stats, waited = engine.last_stats, cuda.waits.total() - before
        if stats.evictions:
            evictions.append((waited - cuda.waits[SAMPLE] + sampled) // len(stats.evictions))
        elif not stats.prompt_tokens and engine.has_work:
            steps.append(waited)
            launches.append((cuda.launches - launched) // LAYERS)
    return ["ok", max(steps), max(evictions) or "-", max(launches)]


def main() -> None:
    print(head(["options", "", "waits of a step", "of an eviction", "launches of a layer"]))
    with tempfile.TemporaryDirectory() as folder:
        load_guard(Path(folder))
        for name, (kv, how, made) in CASES.items():
            with pytest.MonkeyPatch.context() as patch, fake_cuda(patch) as cuda:
                print(line([name, *measure(cuda, kv, how, made)]), flush=True)


if __name__ == "__main__":
    main()
