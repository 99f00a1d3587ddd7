"""Every Triton kernel on the GPU at hand: right against the reference, timed, and the engine end to end.

    python benchmarks/gpu/run.py --model Llama-3.1-8B > h100.md

Needs torch >= 2.11 and triton >= 3.6. Times are medians of `triton.testing.do_bench`, which empties the L2
cache between runs, over inputs that rotate through different pages. Without a GPU it runs the same code under
Triton's interpreter on small shapes (TRITON_INTERPRET=1), to show that the script works; those times mean
nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from curkv.cache.attention import PagedAttention
from curkv.cache.budgets import Budget
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions
from curkv.cache.page_manager import PageManager
from curkv.engine.decode_graphs import DecodeGraphs
from curkv.engine.engine import Engine
from curkv.engine.runner import Runner
from curkv.engine.types import Request, SamplingParams
from curkv.kernels.check import COSTS
from curkv.kernels.costs import evaluate
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import BFLOAT16
from curkv.kernels.pages import allocate
from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.kernels.spec import MODELS, ModelShape
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables

TOLERANCE = 1e-2
"""Relative RMS error allowed for bfloat16."""


@dataclass(frozen=True)
class Sizes:
    """Sequences decoded; tokens stored of each, kept by an eviction, in a chunk; sets of pages to rotate."""

    sequences: int
    tokens: int
    kept: int
    chunk: int
    page_size: int = 64
    copies: int = 3


@dataclass(frozen=True)
class Case:
    """An operation ready to run in both implementations.

    Attributes:
        name: Its name in `curkv.kernels.costs`.
        run: Calls it given an implementation and a number, which picks the inputs.
        written: Gives what it wrote, where it returns nothing.
    """

    name: str
    run: Callable[[Any, int], Any]
    written: Callable[[], Any] | None = None


class Inputs:
    """Random tensors for every operation: `sizes.copies` layers' worth of pages, so that runs can rotate."""

    def __init__(self, model: ModelShape, sizes: Sizes, device: str):
        self.model, self.sizes, self.device = model, sizes, device
        rows = max(sizes.sequences, model.layers) * model.kv_heads
        per_row = -(-sizes.tokens // sizes.page_size)
        shape = sizes.copies * rows * per_row, sizes.page_size
        ids = torch.randperm(shape[0], device=device).to(torch.int32)
        self.tables = ids.view(sizes.copies, -1, model.kv_heads, per_row)
        position = torch.empty(shape, dtype=torch.int32, device=device)
        position[self.tables.long()] = torch.arange(
            per_row * sizes.page_size, dtype=torch.int32, device=device
        ).view(per_row, -1)
        self.pages = allocate(get_format("bfloat16"), *shape, model.head_dim, device)
        for store in (self.pages.k, self.pages.v):
            store.write(torch.randn(*shape, model.head_dim, device=device))
        for side in (self.pages.k_sq, self.pages.v_sq, self.pages.attention):
            side.uniform_()
        self.pages.position.copy_(position)
        self.lengths = torch.full(self.tables.shape[1:3], sizes.tokens, dtype=torch.int32, device=device)
        self.slots = torch.arange(sizes.sequences, dtype=torch.int32, device=device)
        self.cos, self.sin = torch.rand(2, sizes.tokens, model.head_dim // 2, device=device)

    def qkv(self, tokens: int) -> tuple[Tensor, ...]:
        heads = self.model.query_heads, self.model.kv_heads, self.model.kv_heads
        x = torch.randn(tokens, sum(heads), self.model.head_dim, device=self.device).bfloat16()
        return torch.split(x, heads, dim=1)

    def rows(self, copy: int) -> tuple[Tensor, Tensor]:
        """Table and lengths of all heads of one sequence's layers."""
        table = self.tables[copy, : self.model.layers].flatten(0, 1)
        return table, self.lengths[: self.model.layers].flatten()


def cases(x: Inputs) -> Iterator[Case]:
    """Every operation with these inputs."""
    m, s, pages, scale = x.model, x.sizes, x.pages, x.model.head_dim**-0.5
    chunk = torch.tensor([0, s.chunk], dtype=torch.int32, device=x.device)
    positions = torch.arange(s.tokens - s.chunk, s.tokens, dtype=torch.int32, device=x.device)
    q, k, v = x.qkv(s.chunk)
    one = x.slots[:1]
    decode_q = x.qkv(s.sequences)[0]
    yield Case("rope", lambda f, i: f.rope(q, x.cos, x.sin, positions), lambda: q.clone())
    yield Case(
        "store_kv",
        lambda f, i: f.store_kv(pages, k, v, x.cos, x.sin, positions, x.tables[i], x.lengths, one, chunk),
        lambda: [array.clone() for array in pages.arrays.values()],
    )
    yield Case(
        "paged_decode_attention",
        lambda f, i: f.paged_decode_attention(decode_q, pages, x.tables[i], x.lengths, x.slots, scale),
    )
    yield Case(
        "paged_decode_attention, accumulate",
        lambda f, i: f.paged_decode_attention(decode_q, pages, x.tables[i], x.lengths, x.slots, scale, True),
        lambda: pages.attention.clone(),
    )
    prefill = x.tables, x.lengths, one, chunk, scale
    yield Case(
        "paged_prefill_attention",
        lambda f, i: f.paged_prefill_attention(q, pages, prefill[0][i], *prefill[1:]),
    )
    lse = torch.full((s.chunk, m.query_heads), math.log(s.tokens) + 0.5, device=x.device)
    yield Case(
        "column_sums",
        lambda f, i: f.column_sums(q, lse, pages, prefill[0][i], *prefill[1:]),
        lambda: pages.attention.clone(),
    )
    group = m.query_heads // m.kv_heads
    window = torch.randn(m.layers * m.kv_heads, 32, group, m.head_dim, device=x.device).bfloat16()
    known = torch.full(window.shape[:3], math.log(s.tokens) + 0.5, device=x.device)
    yield Case("window_scores", lambda f, i: f.window_scores(window, pages, *x.rows(i), scale))
    yield Case(
        "window_scores, lse given",
        lambda f, i: f.window_scores(window, pages, *x.rows(i), scale, lse=known),
    )
    yield Case("leverage_scores", lambda f, i: f.leverage_scores(pages, *x.rows(i)))
    sketch = torch.randn(m.head_dim, 20, device=x.device) / 20**0.5
    yield Case(
        "leverage_scores, sketch",
        lambda f, i: f.leverage_scores(pages, *x.rows(i), normalization="head", sketch=sketch),
    )
    scores = torch.rand(m.layers, m.kv_heads, s.tokens, device=x.device)
    full = torch.full(scores.shape[:2], s.tokens, dtype=torch.int32, device=x.device)
    keep = torch.full_like(full, s.kept)
    yield Case("select", lambda f, i: f.select(scores, full, keep))
    yield Case("select, shared by a layer", lambda f, i: f.select(scores, full, keep, keep // 5))
    kept = torch.rand(full.numel(), s.tokens, device=x.device).topk(s.kept).indices.sort().values.int()
    yield Case(
        "compact",
        lambda f, i: f.compact(pages, x.rows(i)[0], x.rows(i)[0], kept, keep.flatten()),
        lambda: [array.clone() for array in pages.arrays.values()],
    )
    hidden, weight = torch.randn(s.chunk, m.hidden, device=x.device).bfloat16(), torch.ones(m.hidden)
    weight = weight.bfloat16().to(x.device)
    yield Case("rms_norm", lambda f, i: f.rms_norm(hidden, weight, 1e-5, hidden))
    gate_up = torch.randn(s.chunk, 2 * m.intermediate, device=x.device).bfloat16()
    yield Case("silu_mul", lambda f, i: f.silu_mul(gate_up))


def operations(name: str) -> SimpleNamespace:
    """All operations of an implementation, those that the engine does not call yet included."""
    from importlib import import_module

    extra = {
        op: getattr(import_module(f"curkv.kernels.{op}.{name}"), op)
        for op in ("window_scores", "column_sums")
    }
    kernels = get_kernels(name)
    return SimpleNamespace(**{f: getattr(kernels, f) for f in kernels.__dataclass_fields__}, **extra)


def check(model: ModelShape, device: str) -> Iterator[str]:
    """Markdown rows: relative RMS error of each operation on small inputs."""
    small = replace(model, layers=2)
    sizes = Sizes(sequences=3, tokens=200, kept=60, chunk=70, copies=1)
    triton_ops, reference_ops = operations("triton"), operations("reference")
    for case in [c.name for c in cases(Inputs(small, sizes, device))]:
        results = []
        for ops in (triton_ops, reference_ops):
            torch.manual_seed(0)
            x = Inputs(small, sizes, device)
            ready = next(c for c in cases(x) if c.name == case)
            out = ready.run(ops, 0)
            results.append(ready.written() if ready.written else out)
        error = relative_rms(*results)
        yield f"| {case} | {error:.1e} | {'ok' if error <= TOLERANCE else '**WRONG**'} |"


def relative_rms(actual: Any, expected: Any) -> float:
    """Largest relative RMS difference of a tensor or of several."""
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    errors = []
    for a, e in zip(actual, expected, strict=True):
        a, e = (t.double().nan_to_num(neginf=0.0) for t in (a, e))
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


def times(model: ModelShape, sizes: Sizes, device: str) -> Iterator[str]:
    """Markdown rows: time, bytes by formula, bandwidth and FLOP rate of each operation."""
    x = Inputs(model, sizes, device)
    shapes = {
        "L": model.layers, "H": model.kv_heads, "Q": model.query_heads, "D": model.head_dim,
        "G": model.query_heads // model.kv_heads, "P": sizes.page_size, "d": model.hidden,
        "I": model.intermediate, "s": 2, "a": 2, "n": sizes.tokens, "k": sizes.kept, "w": 32, "r": 20, "S": 1,
    }  # fmt: skip
    ops = operations("triton")
    for case in cases(x):
        decode = case.name.startswith("paged_decode")
        batch = {"B": sizes.sequences, "T": sizes.sequences} if decode else {"B": 1, "T": sizes.chunk}
        ms = median_ms(lambda i, run=case.run: run(ops, i), sizes.copies, device)
        moved, flops = (
            evaluate(formula, shapes | batch | {"c": sizes.chunk})
            for formula in (COSTS[case.name].moved, COSTS[case.name].flops)
        )
        yield f"| {case.name} | {ms * 1e3:.1f} | {moved / ms / 1e6:.0f} | {flops / ms / 1e9:.1f} |"
    yield from rivals(x)


def rivals(x: Inputs) -> Iterator[str]:
    """Markdown rows: decode attention of torch and, where installed, of FlashInfer, on as many tokens."""
    m, s = x.model, x.sizes
    moved = 2 * s.sequences * m.kv_heads * s.tokens * m.head_dim * 2
    q = torch.randn(s.sequences, m.query_heads, 1, m.head_dim, device=x.device).bfloat16()
    shape = (s.copies, 2, s.sequences, m.kv_heads, s.tokens, m.head_dim)
    dense = torch.randn(shape, device=x.device).bfloat16()
    ms = median_ms(lambda i: scaled_dot_product_attention(q, *dense[i], enable_gqa=True), s.copies, x.device)
    yield f"| decode: torch SDPA, dense K and V | {ms * 1e3:.1f} | {moved / ms / 1e6:.0f} | |"
    try:
        import flashinfer
    except ImportError:
        yield "| decode: FlashInfer (not installed) | | | |"
        return
    per_sequence = -(-s.tokens // s.page_size)
    paged = torch.randn(
        s.sequences * per_sequence, 2, s.page_size, m.kv_heads, m.head_dim, device=x.device
    ).bfloat16()
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=x.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    ends = torch.arange(s.sequences + 1, dtype=torch.int32, device=x.device) * per_sequence
    wrapper.plan(
        ends,
        torch.arange(s.sequences * per_sequence, dtype=torch.int32, device=x.device),
        torch.full((s.sequences,), (s.tokens - 1) % s.page_size + 1, dtype=torch.int32, device=x.device),
        m.query_heads,
        m.kv_heads,
        m.head_dim,
        s.page_size,
        q_data_type=torch.bfloat16,
        data_type=torch.bfloat16,
    )
    ms = median_ms(lambda i: wrapper.run(q[:, :, 0], paged), s.copies, x.device)
    yield f"| decode: FlashInfer, equal lengths | {ms * 1e3:.1f} | {moved / ms / 1e6:.0f} | |"


class RandomCheckpoint:
    """Weights of the model's shape, made on the device."""

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
        return torch.randn(shape, device=self._device, dtype=torch.bfloat16) * shape[-1] ** -0.5


def end_to_end(model: ModelShape, device: str, prompt: int, outputs: int, batch: int) -> Iterator[str]:
    """Markdown rows: the engine with `batch` requests, full cache and a quarter, with and without graphs."""
    config = ModelConfig(
        "LlamaForCausalLM", 1024, model.hidden, model.intermediate, model.layers, model.query_heads,
        model.kv_heads, model.head_dim, prompt + outputs, 1e-5, 500_000.0, None, False, False, False, False,
        True, None, (),
    )  # fmt: skip
    kernels = get_kernels("triton")
    weights = Decoder(config, RandomCheckpoint(config, device), kernels, BFLOAT16)
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(1024)}, unk_token="0"))
    layout = CacheLayout(
        full_attention(model.layers, model.kv_heads),
        model.head_dim,
        64,
        get_format("bfloat16"),
        batch,
        prompt + outputs,
    )
    kv = PageManager(layout, batch * layout.sequence_pages(prompt + outputs), kernels, device)
    attention = PagedAttention(kv, rope_tables(config))
    graphs = DecodeGraphs(weights, attention)
    if device == "cuda":
        graphs.capture()
    for policy, budget, decode_graphs in itertools.product(
        ("full", "curdkv"), (Budget("ratio", 0.25),), (None, graphs)
    ):
        options = EvictionOptions(policy=policy, budget=budget if policy != "full" else None)
        engine = Engine(
            Runner(weights, attention, decode_graphs), ModelInfo(tokenizer), 2048, prompt + outputs
        )
        for i in range(batch):
            params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
            request = Request(str(i), torch.randint(1024, (prompt,)).tolist(), params, options)
            engine.add(request, engine.plan(request))
        decode_steps = decode_seconds = prefill_seconds = 0.0
        while engine.has_work:
            engine.step()
            stats = engine.last_stats
            if stats.prompt_tokens:
                prefill_seconds += stats.step_seconds
            else:
                decode_steps += 1
                decode_seconds += stats.step_seconds
        yield (
            f"| {policy} | {'yes' if decode_graphs else 'no'} | {batch * prompt / prefill_seconds:.0f}"
            f" | {batch * decode_steps / max(decode_seconds, 1e-9):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="Llama-3.1-8B", choices=[m.name for m in MODELS])
    model = next(m for m in MODELS if m.name == parser.parse_args().model)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    name = torch.cuda.get_device_name() if gpu else f"Triton's interpreter on {platform.machine()}"
    print(f"# {name}\n\n{model.name}, torch {torch.__version__}, triton {triton.__version__}\n")
    if gpu:
        sizes = Sizes(sequences=32, tokens=8192, kept=2048, chunk=2048)
        run = {"prompt": 4096, "outputs": 128, "batch": 8}
    else:
        model = replace(model, layers=1, hidden=128, intermediate=256, query_heads=4, kv_heads=2)
        sizes = Sizes(sequences=2, tokens=128, kept=32, chunk=32, copies=1)
        run = {"prompt": 40, "outputs": 4, "batch": 2}
    print("| operation | relative RMS error | |\n|---|---|---|")
    for row in check(model, device):
        print(row, flush=True)
    print("\n| operation | median us | GB/s by formula | TFLOP/s |\n|---|---|---|---|")
    for row in times(model, sizes, device):
        print(row, flush=True)
    print("\n| policy | CUDA graphs | prefill tok/s | decode tok/s |\n|---|---|---|---|")
    for row in end_to_end(model, device, **run):
        print(row, flush=True)


if __name__ == "__main__":
    main()
