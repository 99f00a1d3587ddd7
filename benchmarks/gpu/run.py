"""Every Triton kernel on the GPU at hand: right against the reference, timed, and the engine end to end.

    python benchmarks/gpu/run.py --model Llama-3.1-8B > h100.md

Needs torch >= 2.11 and triton >= 3.6. Times are medians of `triton.testing.do_bench`, which empties the L2
cache between runs, over inputs that rotate through different pages. Without a GPU it runs the same code under
Triton's interpreter on small shapes (TRITON_INTERPRET=1), to show that the script works; those times mean
nothing.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import triton
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from curkv.bench.script import script, submit
from curkv.cache.attention import PagedAttention
from curkv.cache.budgets import Budget
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions
from curkv.cache.page_manager import PageManager
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.engine import Engine
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.engine.types import SamplingParams
from curkv.kernels.costs import evaluate
from curkv.kernels.dispatch import cases, get_kernels, load
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import BFLOAT16
from curkv.kernels.spec import MODELS, Call, Inputs, ModelShape, Workload
from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables
from curkv.tables import head, line

SHAPES = {model.name: model for model in MODELS}
TOLERANCE = 1e-2
"""Relative RMS error allowed for bfloat16."""


def check(model: ModelShape, device: str) -> Iterator[str]:
    """Markdown rows: relative RMS error of each operation on small inputs."""
    workload = Workload(replace(model, layers=2), 3, 200, chunk=70, kept=60)
    for operation, name, case in cases():
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            results.append(case.call(Inputs(workload, device)).run(load(operation, backend)))
        error = relative_rms(*results)
        yield line([name, f"{error:.1e}", "ok" if error <= TOLERANCE else "**WRONG**"])


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


def times(workload: Workload, layers: int, device: str) -> Iterator[str]:
    """Markdown rows: time, bytes by formula, bandwidth and FLOP rate of each operation."""
    inputs = Inputs(workload, device, layers=layers)
    for operation, name, case in cases():
        calls, kernel = [], load(operation, "triton")
        for inputs.layer in range(layers):
            calls.append(case.call(inputs))
        ms = median_ms(partial(_run, calls, kernel), layers, device)
        letters = workload.letters(case.phase) | {"S": 1}
        moved, flops = (evaluate(formula, letters) for formula in (case.cost.moved, case.cost.flops))
        yield line([name, f"{ms * 1e3:.1f}", f"{moved / ms / 1e6:.0f}", f"{flops / ms / 1e9:.1f}"])
    yield from rivals(workload, layers, device)


def _run(calls: list[Call], kernel: Callable[..., Any], i: int) -> None:
    calls[i].run(kernel)


def rivals(s: Workload, layers: int, device: str) -> Iterator[str]:
    """Markdown rows: decode attention of torch and, where installed, of FlashInfer, on as many tokens."""
    m = s.model
    moved = 2 * s.sequences * m.kv_heads * s.tokens * m.head_dim * 2
    q = torch.randn(s.sequences, m.query_heads, 1, m.head_dim, device=device).bfloat16()
    shape = (layers, 2, s.sequences, m.kv_heads, s.tokens, m.head_dim)
    dense = torch.randn(shape, device=device).bfloat16()

    def attend(i: int) -> Tensor:
        k, v = dense[i]
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    ms = median_ms(attend, layers, device)
    yield line(["decode: torch SDPA, dense K and V", f"{ms * 1e3:.1f}", f"{moved / ms / 1e6:.0f}", ""])
    try:
        import flashinfer
    except ImportError:
        yield line(["decode: FlashInfer (not installed)", "", "", ""])
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
    yield line(["decode: FlashInfer, equal lengths", f"{ms * 1e3:.1f}", f"{moved / ms / 1e6:.0f}", ""])


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
        weight = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
        return weight.mul_(shape[-1] ** -0.5)


def end_to_end(model: ModelShape, device: str, prompt: int, outputs: int, batch: int) -> Iterator[str]:
    """Markdown rows: the engine with `batch` requests, full cache and a quarter, with and without graphs."""
    config = ModelConfig(
        "LlamaForCausalLM", 1024, model.hidden, model.intermediate, model.layers, model.query_heads,
        model.kv_heads, model.head_dim, prompt + outputs, 1e-5, 500_000.0, None, False, False, False, False,
        True, None, (),
    )  # fmt: skip
    kernels = get_kernels("triton", device)
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
    graphs = Replay(weights, attention, CudaGraphs())
    if device == "cuda":
        graphs.prepare()
    for policy, budget, replay in itertools.product(
        ("full", "curdkv"), (Budget("ratio", 0.25),), (None, graphs)
    ):
        options = EvictionOptions(policy=policy, budget=budget if policy != "full" else None)
        engine = Engine(Runner(weights, attention, replay), ModelInfo(tokenizer), 2048, prompt + outputs)
        for i in range(batch):
            params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
            submit(engine, str(i), torch.randint(1024, (prompt,)).tolist(), params, options)
        decode_steps = decode_seconds = prefill_seconds = 0.0
        while engine.has_work:
            engine.step()
            stats = engine.last_stats
            if stats.prompt_tokens:
                prefill_seconds += stats.step_seconds
            else:
                decode_steps += 1
                decode_seconds += stats.step_seconds
        decode_rate = batch * decode_steps / max(decode_seconds, 1e-9)
        rates = f"{batch * prompt / prefill_seconds:.0f}", f"{decode_rate:.0f}"
        yield line([policy, "yes" if replay else "no", *rates])


def main(
    model: Annotated[str, typer.Option(help=f"Whose shapes: {', '.join(SHAPES)}.")] = "Llama-3.1-8B",
) -> None:
    """Prints three tables."""
    if model not in SHAPES:
        raise typer.BadParameter(f"{model}; there are {', '.join(SHAPES)}", param_hint="--model")
    shape = SHAPES[model]
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    name = torch.cuda.get_device_name() if gpu else f"Triton's interpreter on {platform.machine()}"
    print(f"# {name}\n\n{model}, torch {torch.__version__}, triton {triton.__version__}\n")
    if gpu:
        workload, layers = Workload(shape, 32, 8192, kept=2048, chunk=2048), 3
        run = {"prompt": 4096, "outputs": 128, "batch": 8}
    else:
        shape = replace(shape, layers=1, hidden=128, intermediate=256, query_heads=4, kv_heads=2)
        workload, layers = Workload(shape, 2, 128, kept=32, chunk=32), 1
        run = {"prompt": 40, "outputs": 4, "batch": 2}
    print(head(["operation", "relative RMS error", ""]))
    for row in check(shape, device):
        print(row, flush=True)
    print("\n" + head(["operation", "median us", "GB/s by formula", "TFLOP/s"]))
    for row in times(workload, layers, device):
        print(row, flush=True)
    print("\n" + head(["policy", "CUDA graphs", "prefill tok/s", "decode tok/s"]))
    for row in end_to_end(shape, device, **run):
        print(row, flush=True)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
