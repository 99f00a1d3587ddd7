"""What is worth knowing in the first minutes on a GPU, phase by phase; each yields rows as it goes."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch
import triton
from alone import check, times
from engines import generate, overlap, random_engine, read_engine

from curkv.bench import baseline
from curkv.bench.process import curkv_serve, running
from curkv.bench.script import submit
from curkv.bench.small_model import write_small_model
from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.kernels.linear.formats import BFLOAT16, FP8, GPU_INT8
from curkv.kernels.spec import MODELS, ModelShape, Workload
from curkv.models.loading import load_tokenizer, resolve_model

ROOT = Path(__file__).resolve().parents[2]
LLAMA = MODELS[1]
TINY = ModelShape("tiny", 2, 4, 2, 32, 128, 256)

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where phases run.

    Attributes:
        device: "cuda", or "cpu" to try the phases on small shapes under Triton's interpreter.
        out: folder for long outputs.
        model: a real model, as `--model` takes it.
    """

    device: str
    out: Path
    model: str

    @property
    def gpu(self) -> bool:
        """Whether there is anything to measure."""
        return self.device == "cuda"


OPTIONS: list[dict[str, Any]] = [
    *({"policy": name} | ({} if name == "full" else {"budget": "50%"}) for name in policy_names()),
    *({"policy": "curdkv", "budget": "50%", "leverage": kind} for kind in ("sketch", "norm", "exact")),
    *({"policy": "snapkv", "budget": "50%", "allocation": kind} for kind in ("adaptive", "pyramid")),
    {"policy": "snapkv", "budget": "50%", "merge": "nearest"},
    {"policy": "snapcur", "budget": "50%", "prefill": "streaming", "prefill_chunk": 32},
    {"policy": "h2o", "budget": "50%", "decode_budget": 40, "decode_interval": 2, "recent_tokens": 4},
]
"""Every policy and what changes the way of an eviction."""

SAMPLING: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"prompt_logprobs": 2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {3: 2.0}},
    {"n": 2},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "seed": 1},
]


def env(place: Place) -> Iterator[Row]:
    """Versions, and what the card and the way to it can do at most."""
    yield {"what": "torch", "value": torch.__version__}
    yield {"what": "triton", "value": triton.__version__}
    for package in ("numba", "numpy", "transformers"):
        yield {"what": package, "value": import_module(package).__version__}
    yield {"what": "python", "value": sys.version}
    if not place.gpu:
        return
    yield {"what": "GPU", "value": torch.cuda.get_device_name()}
    yield {"what": "memory, free and all", "value": torch.cuda.mem_get_info()}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    yield {"what": "driver, clock, power", "value": _output(query)}
    big = torch.empty(4 << 30, dtype=torch.int8, device="cuda").random_()
    other = torch.empty_like(big)
    yield {"what": "copy TB/s", "value": 2 * big.nbytes / milliseconds(place, lambda: other.copy_(big)) / 1e9}
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    yield {"what": "bfloat16 TFLOP/s", "value": 2 * 8192**3 / milliseconds(place, lambda: a @ b) / 1e9}
    host = torch.empty(64 << 20, dtype=torch.int8).pin_memory()
    target = big[: host.nbytes]
    ms = milliseconds(place, lambda: target.copy_(host, non_blocking=True))
    yield {"what": "pinned upload GB/s", "value": host.nbytes / ms / 1e6}
    tiny = torch.empty(1, device="cuda")
    yield {"what": "launch us", "value": 1e6 * seconds_each(1000, lambda: tiny.add_(1))}
    upload = seconds_each(200, lambda: torch.tensor([1, 2, 3], device="cuda"))
    yield {"what": "pageable upload us", "value": 1e6 * upload}


def tests(place: Place) -> Iterator[Row]:
    """The tests of the Triton kernels and of the engine over them, on the device."""
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail=40", "-rf", "--tb=line",
        "tests/kernels/triton", "tests/engine/test_triton.py",
        "--ignore=tests/kernels/triton/test_check.py", "--ignore=tests/kernels/triton/test_mutations.py",
    ]  # fmt: skip
    if find_spec("xdist") is not None:
        command += ["-n", "8"]
    if not place.gpu:  # under the interpreter the suite runs them anyway: some are enough
        command += ["-k", "rms_norm or rope"]
    environment = os.environ | {
        "CURKV_TEST_DEVICE": place.device,
        "TRITON_INTERPRET": str(int(not place.gpu)),
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    (place.out / "tests.txt").write_text(done.stdout + done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield {"what": line}
    yield {
        "what": done.stdout.splitlines()[-1] if done.stdout else done.stderr[-300:],
        "status": done.returncode,
    }


def policies(place: Place) -> Iterator[Row]:
    """Every policy on a small random model.

    float32 must keep what plain torch keeps on a CPU, bfloat16 must not fail.
    """
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_small_model(model)
        draw = torch.Generator().manual_seed(1)
        lengths = (300, 170) if place.gpu else (40, 24)
        prompts = [torch.randint(1024, (n,), generator=draw).tolist() for n in lengths]
        engines = _Engines(
            read_engine(model, "triton", place.device, "float32"),
            read_engine(model, "reference", "cpu", "float32"),
            read_engine(model, "triton", place.device, "bfloat16"),
            tokens=8 if place.gpu else 2,
        )
        yield from engines.compare(prompts, OPTIONS if place.gpu else OPTIONS[::12])
        for sampling in SAMPLING if place.gpu else SAMPLING[-1:]:
            yield {"options": sampling} | attempt(lambda s=sampling: _ran(engines.half, prompts, **s))  # type: ignore[misc]
        explain = [{"policy": "snapkv", "budget": "50%"}, {"policy": "compactor", "budget": "50%"}]
        yield {"options": "explain"} | attempt(lambda: _ran(engines.half, prompts, tokens=0, explain=explain))


@dataclass(frozen=True)
class _Engines:
    """Engines over one model: `ours` and `plain` in float32, `half` in bfloat16; `tokens` are compared."""

    ours: Engine
    plain: Engine
    half: Engine
    tokens: int

    def compare(self, prompts: list[list[int]], several: list[dict[str, Any]]) -> Iterator[Row]:
        """A row for each set of options."""
        for options in several:
            yield {"options": options} | attempt(lambda o=options: self._one(prompts, o))  # type: ignore[misc]

    def _one(self, prompts: list[list[int]], options: dict[str, Any]) -> Row:
        tokens, kept = generate(self.ours, prompts, options, self.tokens)
        wanted, expected = generate(self.plain, prompts, options, self.tokens)
        half, _ = generate(self.half, prompts, options, self.tokens)
        agree = sum(a == b for key in wanted for a, b in zip(wanted[key], half[key], strict=True))
        return {
            "same_tokens": tokens == wanted,
            "overlap": round(overlap(kept, expected), 5),
            "bfloat16_agrees": f"{agree} of {sum(map(len, wanted.values()))}",
        }


def _ran(engine: Engine, prompts: list[list[int]], **how: Any) -> Row:
    generate(engine, prompts, {"policy": "full"}, **{"tokens": 3} | how)
    return {"ran": True}


def kernels(place: Place) -> Iterator[Row]:
    """Every kernel alone."""
    shape = LLAMA if place.gpu else replace(TINY, layers=1)
    yield from check(shape, place.device)
    if place.gpu:
        workload, layers = Workload(shape, 32, 8192, kept=2048, chunk=2048), 3
    else:
        workload, layers = Workload(shape, 2, 128, kept=32, chunk=32), 1
    yield from times(workload, layers, place.device)


def decode(place: Place) -> Iterator[Row]:
    """What a step costs by batch, context, share kept and formats, beside reading weights and cache once."""
    shape = LLAMA if place.gpu else TINY
    formats = ((BFLOAT16, "bfloat16"), (FP8, "fp8"), (GPU_INT8, "int8"))
    for form, kv_dtype in formats if place.gpu else formats[:2]:
        plain = form is BFLOAT16
        batch, tokens, size = (64, 33_000 if plain else 8400, 50 << 30) if place.gpu else (4, 512, 20 << 20)
        yield from attempts(
            lambda f=form, d=kv_dtype, b=batch, t=tokens, s=size: _decode_of(  # type: ignore[misc]
                place, random_engine(shape, place.device, b, t, s, form=f, kv_dtype=d)
            )
        )
        if place.gpu:
            torch.cuda.empty_cache()


def _decode_of(place: Place, engine: Engine) -> Iterator[Row]:
    """Steps of an engine over random contents."""
    kv, runner = engine.kv, engine.runner
    formats = {"weights": runner.model.weights, "kv_dtype": kv.layout.format.name}
    for store in (kv.pages.k, kv.pages.v):
        for array in store.arrays.values():
            if array.element_size() == 1:
                array.view(torch.int8).random_(0, 100)  # of 8-bit floats no NaN
            else:
                array.normal_()
    weights = sum(n for kind, n in runner.model.weights_bytes.items() if kind != "embedding")
    bandwidth = _bandwidth(place)
    yield formats | {
        "cuda_graphs": runner.replay is not None,
        "pages": kv.num_pages,
        "bandwidth_gb_per_s": bandwidth / 1e9,
    }
    contexts = [n for n in (8192, 32_768) if n < kv.layout.max_tokens]
    cases = itertools.product(contexts, (1.0, 0.25), (1, 8, 32, 64)) if place.gpu else [(128, 0.5, 2)]
    for context, share, batch in cases:
        held = int(context * share)
        if kv.layout.sequence_pages(held + 64) * batch > kv.num_pages:
            continue
        for ragged in (False, True) if share < 1 else (False,):
            slots = [kv.add_sequence() for _ in range(batch)]
            kv.extend(slots, [held] * batch)
            if ragged:
                _make_ragged(engine, slots, held)
            stored = sum(kv.sequence_tokens(slot) for slot in slots)
            steps = _decode_steps(engine, slots, context, 40 if place.gpu else 2)
            ms = statistics.median(steps) * 1e3
            floor = (weights + stored * kv.layout.head_token_bytes) / bandwidth * 1e3
            yield formats | {
                "batch": batch, "context": context, "kept": share, "ragged": ragged,
                "step_ms": round(ms, 3), "floor_ms": round(floor, 3), "of_floor": round(floor / ms, 3),
                "tok_per_s": round(batch / ms * 1e3),
            }  # fmt: skip
            for slot in slots:
                kv.free(slot)
    if place.gpu and kv.layout.format.name == "bfloat16":
        slots = [kv.add_sequence() for _ in range(8)]
        kv.extend(slots, [8192] * 8)
        with torch.profiler.profile() as profile:
            _decode_steps(engine, slots, 8192, 3)
        table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=30)
        (place.out / "decode_profile.txt").write_text(table)


def _make_ragged(engine: Engine, slots: list[int], held: int) -> None:
    """Leaves heads of uneven length, as adaptive policies do: 70 % of `held` on average."""
    draw = torch.Generator().manual_seed(3)
    heads = engine.kv.layout.num_layers, engine.kv.layout.num_kv_heads
    for slot in slots:
        share = torch.normal(0.7, 0.25, heads, generator=draw).clamp(0.1, 1.0)
        counts = share.mul(held).int().to(engine.kv.device)
        width = torch.arange(int(counts.max()), dtype=torch.int32, device=engine.kv.device)
        engine.kv.evict(slot, width.expand(*heads, -1).contiguous(), counts)


def _decode_steps(engine: Engine, slots: list[int], position: int, count: int) -> list[float]:
    """Seconds of steps that give each sequence a token, its choice by the greatest logit included."""
    seconds, last = [], engine.kv.layout.max_tokens - 1
    for step in range(count):
        started = time.perf_counter()
        starts = [min(position + step, last)] * len(slots)
        engine.runner.run(slots, [[7]] * len(slots), starts).argmax(-1).tolist()
        seconds.append(time.perf_counter() - started)
    return seconds


def prefill(place: Place) -> Iterator[Row]:
    """Prompts in, evictions, tokens out: by size of the chunks, by what begins a text, by policy.

    Last the settings that were fastest: those of `GPU` in curkv/engine/device.py.
    """
    shape, n, batch = (LLAMA, 8192, 4) if place.gpu else (TINY, 30, 2)
    chunks = (512, 2048, 8192) if place.gpu else (16,)
    quarter = [
        {"policy": name, "budget": "25%"}
        for name in ("curdkv", "snapcur", "snapkv", "cur-exact", "h2o", "expected-attention", "keydiff")
    ]
    size = (16, 16_384, 24 << 30) if place.gpu else (4, 512, 20 << 20)
    rates: dict[tuple[int, bool], int] = {}
    for chunk in chunks:
        engine = random_engine(shape, place.device, *size, chunk=chunk)
        several: list[tuple[bool, Row]] = [(True, {"policy": "full"})] * 2  # the first one compiles
        several += [(False, {"policy": "full"})]
        if not place.gpu:
            several = [(True, quarter[0])]
        elif chunk == 2048:
            several += [(True, options) for options in quarter]
        for dense, options in several:
            engine.runner.attention.dense_prompts = dense
            row = attempt(lambda e=engine, o=options: _prefill_once(e, o, n, batch))  # type: ignore[misc]
            if options == several[0][1]:
                rates[chunk, dense] = row.get("tok_per_s", 0)
            yield {"chunk": chunk, "dense_prompts": dense, "options": options} | row
        del engine
        if place.gpu:
            torch.cuda.empty_cache()
    (chunk, dense), _ = max(rates.items(), key=lambda item: item[1])
    yield {"setting": f"max_step_tokens {chunk}, dense_prompts {dense}"}


def question(place: Place) -> Iterator[Row]:
    """A short question behind a long text that is held: milliseconds until its first token."""
    shape, held, lengths = (LLAMA, 32_768, (16, 64, 256)) if place.gpu else (TINY, 100, (16,))
    engine = random_engine(shape, place.device, 2, held + 512, (8 << 30) if place.gpu else 20 << 20)
    kv = engine.kv
    module: Any = import_module("curkv.kernels.paged_prefill_attention.triton")
    most = module.MOST_SPLITS
    for tokens, splits in itertools.product(lengths, (1, most)):
        module.MOST_SPLITS = splits
        slot = kv.add_sequence()
        kv.extend([slot], [held])
        seconds = []
        for _ in range(10 if place.gpu else 1):
            mark, started = kv.mark([slot]), time.perf_counter()
            engine.runner.run([slot], [[7] * tokens], [held]).argmax(-1).tolist()
            seconds.append(time.perf_counter() - started)
            kv.retract(mark)
        kv.free(slot)
        yield {"held": held, "tokens": tokens, "most_splits": splits, "ms": statistics.median(seconds) * 1e3}
    module.MOST_SPLITS = most


def _prefill_once(engine: Engine, options: dict[str, Any], n: int, batch: int) -> Row:
    params = SamplingParams(
        max_tokens=17 if engine.kv.device.type == "cuda" else 2, temperature=0.0, ignore_eos=True
    )
    for i in range(batch):
        submit(engine, str(i), torch.randint(1000, (n,)).tolist(), params, parse_options(options))
    first: dict[str, float] = {}
    evictions: list[float] = []
    decodes: list[float] = []
    started = time.perf_counter()
    while engine.has_work:
        before = time.perf_counter()
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - started)
        evictions += [eviction.seconds for eviction in engine.last_stats.evictions]
        if not engine.last_stats.prompt_tokens:
            decodes.append(time.perf_counter() - before)
    engine.drop_prefixes()
    return {
        "tok_per_s": round(batch * n / max(first.values())),
        "last_first_token_s": round(max(first.values()), 3),
        "eviction_ms": [round(seconds * 1e3, 1) for seconds in evictions[:batch]],
        "decode_ms": round(statistics.median(decodes) * 1e3, 2) if decodes else None,
    }


def peer(place: Place) -> Iterator[Row]:
    """The same shape in transformers: SDPA over a dense cache, launched operation by operation."""
    transformers: Any = import_module("transformers")  # its types are wrong in places
    shape = LLAMA if place.gpu else TINY
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=40_000, attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    with torch.device(place.device):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(default)
    for batch, n in ((1, 8192), (8, 8192), (32, 8192)) if place.gpu else ((2, 64),):
        cache = transformers.DynamicCache(config=config)
        for layer in range(shape.layers):
            size = 2, batch, shape.kv_heads, n, shape.hidden // shape.query_heads
            k, v = torch.randn(size, device=place.device, dtype=torch.bfloat16)
            cache.update(k, v, layer)
        ids, steps = torch.zeros(batch, 1, dtype=torch.int64, device=place.device), []
        with torch.inference_mode():
            for _ in range(12 if place.gpu else 2):
                started = time.perf_counter()
                model(ids, past_key_values=cache).logits[:, -1].argmax(-1).tolist()
                steps.append(time.perf_counter() - started)
        ms = statistics.median(steps) * 1e3
        yield {"batch": batch, "context": n, "step_ms": ms, "tok_per_s": round(batch / ms * 1e3)}
        del cache
    with torch.inference_mode():
        prompt = torch.zeros(1, 8192 if place.gpu else 64, dtype=torch.int64, device=place.device)
        ms = milliseconds(place, lambda: model(prompt, logits_to_keep=1), repeat=3, warm=1)
        yield {"prefill_tok_per_s": round(prompt.shape[1] / ms * 1e3)}


def real(place: Place) -> Iterator[Row]:
    """Real weights: in float32 the tokens of transformers and the kept sets of plain torch; then bfloat16."""
    directory = resolve_model(place.model)
    ids = load_tokenizer(directory).encode(documentation_text()[:60_000]).ids
    prompts = [ids[:900], ids[2000:2500], ids[4000:4100]] if place.gpu else [ids[:12]]
    new = 8 if place.gpu else 2
    reference: Any = baseline.load(directory)
    reference.to(place.device)
    wanted = {
        f"{i}.0": baseline.generate(reference, torch.tensor([prompt], device=place.device), new)[0].tolist()
        for i, prompt in enumerate(prompts)
    }
    del reference
    engines = _Engines(
        read_engine(directory, "triton", place.device, "float32"),
        read_engine(directory, "reference", place.device, "float32"),
        read_engine(directory, "triton", place.device, "bfloat16"),
        tokens=new,
    )
    found, _ = generate(engines.ours, prompts, {"policy": "full"}, new)
    yield {"options": "transformers, float32", "same_tokens": found == wanted}
    found, _ = generate(engines.half, prompts, {"policy": "full"}, new)
    agree = sum(a == b for key in wanted for a, b in zip(wanted[key], found[key], strict=True))
    yield {"options": "transformers, bfloat16", "bfloat16_agrees": f"{agree} of {new * len(prompts)}"}
    yield from engines.compare(prompts, OPTIONS if place.gpu else [])


def server(place: Place) -> Iterator[Row]:
    """The HTTP server on the device: seconds until it is ready, answers, metrics."""
    command = curkv_serve("--model", place.model, "--served-model-name", "x", "--device", place.device)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    started = time.monotonic()
    with (
        (place.out / "server.txt").open("w") as log,
        running(command, log, environment) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield {"request": "ready", "seconds": round(time.monotonic() - started, 1)}
        for body in _BODIES:
            yield {"request": str(body)[:60]} | attempt(lambda b=body: _ask(client, b))  # type: ignore[misc]
        (place.out / "metrics.txt").write_text(client.get("/metrics").text)


_BODIES: list[dict[str, Any]] = [
    {"prompt": "The capital of France is"},
    {"prompt": "word " * 800, "kv": {"policy": "snapcur", "budget": "25%"}},
    {"prompt": "A JSON object:", "structured_outputs": {"regex": "[0-9]{4}"}},
    {"prompt": "word " * 300, "temperature": 1.0, "top_p": 0.9},
]


def _ask(client: httpx.Client, body: Row) -> Row:
    started = time.monotonic()
    response = client.post("/v1/completions", json={"model": "x", "max_tokens": 16} | body)
    if response.is_error:
        raise RuntimeError(response.text[:300])
    answer = response.json()["choices"][0]["text"]
    return {"seconds": round(time.monotonic() - started, 3), "answer": answer}


def sanitizer(place: Place) -> Iterator[Row]:
    """Accesses out of bounds in any kernel, on small inputs, with no allocator to hide them."""
    if shutil.which("compute-sanitizer") is None:
        raise RuntimeError("compute-sanitizer of the CUDA toolkit is not installed")
    code = "from alone import check; from curkv.kernels.spec import MODELS; list(check(MODELS[0], 'cuda'))"
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--launch-timeout",
        "60",
        sys.executable,
        "-c",
        code,
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    (place.out / "sanitizer.txt").write_text(done.stdout)
    yield {"status": done.returncode, "what": " / ".join(done.stdout.splitlines()[-3:])}


def attempts(run: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows that it gives, and how it failed if it did."""
    try:
        yield from run()
    except Exception as error:
        yield _failure(error)


def attempt(run: Callable[[], Row]) -> Row:
    """What it gives, or how it failed: the rest of the phase goes on."""
    try:
        return run()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Row:
    where = traceback.extract_tb((error.__cause__ or error).__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where[-3:]]
    return {"FAILED": repr(error.__cause__ or error)[:300], "where": places}


def milliseconds(place: Place, run: Callable[[], Any], repeat: int = 30, warm: int = 3) -> float:
    """Median milliseconds by CUDA events; without a GPU of a single run."""
    for _ in range(warm):
        run()
    if not place.gpu:
        return 1e3 * seconds_each(1, run)
    event: Any = torch.cuda.Event
    pairs = [[event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for before, after in pairs:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return float(statistics.median(before.elapsed_time(after) for before, after in pairs))


def seconds_each(count: int, run: Callable[[], Any]) -> float:
    """Seconds of a call, over many in a row."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def _bandwidth(place: Place) -> float:
    """Bytes per second that a copy moves."""
    big = torch.empty(1 << (30 if place.gpu else 26), dtype=torch.int8, device=place.device)
    other = torch.empty_like(big)
    return 2e3 * big.nbytes / milliseconds(place, lambda: other.copy_(big))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return repr(error)


PHASES: dict[str, Callable[[Place], Iterator[Row]]] = {
    phase.__name__: phase
    for phase in (env, tests, policies, kernels, decode, prefill, question, peer, real, server, sanitizer)
}
