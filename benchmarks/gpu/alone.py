"""Every Triton kernel alone: right against its reference, and timed beside what it could be replaced with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from curkv.kernels.costs import evaluate
from curkv.kernels.dispatch import cases, load, triton_cases
from curkv.kernels.spec import Call, Inputs, ModelShape, Workload

Row = dict[str, Any]

TOLERANCE = 1e-2
"""Relative RMS error allowed for bfloat16."""


def check(model: ModelShape, device: str) -> Iterator[Row]:
    """Relative RMS error of each operation on small inputs."""
    workload = Workload(replace(model, layers=2), 3, 200, chunk=70, kept=60)
    for operation, name, case in cases():
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            results.append(case.call(Inputs(workload, device)).run(load(operation, backend)))
        error = relative_rms(*results)
        yield {"operation": name, "relative_rms_error": error, "right": error <= TOLERANCE}


def relative_rms(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative RMS difference of several tensors."""
    errors = []
    for one, other in zip(actual, expected, strict=True):
        a, e = (x.double().nan_to_num(neginf=0.0) for x in (one, other))
        errors.append(float((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30)))
    return max(errors)


def median_ms(run: Callable[[int], Any], copies: int, device: str) -> float:
    """Median milliseconds of a call, over inputs that rotate."""
    turn = itertools.cycle(range(copies))
    if device == "cuda":
        return float(triton.testing.do_bench(lambda: run(next(turn)), return_mode="median"))
    started = time.perf_counter()
    run(next(turn))
    return (time.perf_counter() - started) * 1e3


def times(workload: Workload, layers: int, device: str) -> Iterator[Row]:
    """Median time of each operation, and the bandwidth and FLOP rate that follow by formula."""
    inputs = Inputs(workload, device, layers=layers)
    for operation, name, case in triton_cases():
        calls, kernel = [], load(operation, "triton")
        for inputs.layer in range(layers):
            calls.append(case.call(inputs))
        ms = median_ms(partial(_run, calls, kernel), layers, device)
        letters = workload.letters(case.phase) | {"S": 1, "p": 1}
        moved, flops = (evaluate(formula, letters) for formula in (case.cost.moved, case.cost.flops))
        yield _timing(name, ms, moved, flops)
    yield from rivals(workload, layers, device)


def _run(calls: list[Call], kernel: Callable[..., Any], i: int) -> None:
    calls[i].run(kernel)


def _timing(operation: str, ms: float, moved: float, flops: float = 0.0) -> Row:
    rates = {"gb_per_s": moved / ms / 1e6, "tflop_per_s": flops / ms / 1e9}
    return {"operation": operation, "median_us": ms * 1e3} | rates


def rivals(s: Workload, layers: int, device: str) -> Iterator[Row]:
    """Decode attention of torch and, where installed, of FlashInfer, on as many tokens."""
    m = s.model
    moved = 2 * s.sequences * m.kv_heads * s.tokens * m.head_dim * 2
    q = torch.randn(s.sequences, m.query_heads, 1, m.head_dim, device=device).bfloat16()
    shape = (layers, 2, s.sequences, m.kv_heads, s.tokens, m.head_dim)
    dense = torch.randn(shape, device=device).bfloat16()

    def attend(i: int) -> Tensor:
        k, v = dense[i]
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    ms = median_ms(attend, layers, device)
    yield _timing("decode: torch SDPA, dense K and V", ms, moved)
    try:
        import flashinfer
    except ImportError:
        return
    per_sequence = -(-s.tokens // s.page_size)
    paged = torch.randn(
        s.sequences * per_sequence, 2, s.page_size, m.kv_heads, m.head_dim, device=device
    ).bfloat16()
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    ends = torch.arange(s.sequences + 1, dtype=torch.int32, device=device) * per_sequence
    wrapper.plan(
        ends,
        torch.arange(s.sequences * per_sequence, dtype=torch.int32, device=device),
        torch.full((s.sequences,), (s.tokens - 1) % s.page_size + 1, dtype=torch.int32, device=device),
        m.query_heads,
        m.kv_heads,
        m.head_dim,
        s.page_size,
        q_data_type=torch.bfloat16,
        data_type=torch.bfloat16,
    )
    ms = median_ms(lambda i: wrapper.run(q[:, :, 0], paged), layers, device)
    yield _timing("decode: FlashInfer, equal lengths", ms, moved)
