"""Where a step's time goes: every operation of prefill and decode, and decode steps run as one call.

python benchmarks/operations.py --weights int8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from curkv.bench.text import token_spans
from curkv.cache.parsing import parse_options
from curkv.engine import build
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams
from curkv.kernels.dispatch import Kernels, get_kernels

NAMES = dict.fromkeys(("pack_linear", "pack_linear_int8", "pack_linear_int4"), "linear layers")


def main() -> None:
    """Runs the requests twice, with a clock around each operation and without, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", default="int8", choices=["float32", "int8", "int4"])
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=96, help="as many as keep all running together")
    parser.add_argument("--policy", default="full")
    parser.add_argument("--budget")
    args = parser.parse_args()

    spent: Counter[str] = Counter()
    options = build.EngineOptions(
        args.model, weights=args.weights, kv_dtype=args.kv_dtype, kv_cache_bytes=2**31
    )
    recorded = build.build_engine(options)
    plain = get_kernels("cpu")
    build.get_kernels = lambda *_: timed(plain, spent)  # type: ignore[assignment]
    engine = build.build_engine(options)
    engine.decode_graphs = None
    totals = {}
    for phase in ("prefill", "decode"):
        run(engine, args, phase, spent)  # the first time kernels are loaded
        spent.clear()
        seconds, steps = run(engine, args, phase, spent)
        unit = steps if phase == "decode" else args.concurrency * args.prompt_tokens
        totals[phase] = seconds / unit
        label = "step" if phase == "decode" else "token"
        print(f"\n{phase}, kernel by kernel: {1e3 * seconds / unit:.2f} ms a {label}\n")
        print(f"| operation | ms a {label} | share |\n|---|---|---|")
        for name, used in [*spent.most_common(), ("everything else", seconds - spent.total())]:
            print(f"| {name} | {1e3 * used / unit:.3f} | {used / seconds:.1%} |")
    run(recorded, args, "decode", Counter())
    seconds, steps = run(recorded, args, "decode", Counter())
    print(f"\ndecode, recorded: {1e3 * seconds / steps:.2f} ms a step", end="")
    print(f", {totals['decode'] * steps / seconds:.2f}x as fast")


def run(engine: Engine, args: argparse.Namespace, phase: str, spent: Counter[str]) -> tuple[float, int]:
    """Serves the requests; returns the seconds that steps of the phase took, and how many those were.

    Decode steps count while all requests decode; their median is taken for all. `spent` is left with what was
    spent in the phase alone.
    """
    sampling = SamplingParams(args.new_tokens, temperature=0.0, ignore_eos=True)
    kv = {} if args.policy == "full" else {"policy": args.policy, "budget": args.budget}
    prompts = token_spans(engine.tokenizer, args.concurrency, args.prompt_tokens, seed=0)
    for i, prompt in enumerate(prompts):
        request = Request(str(i), prompt, sampling, parse_options(kv))
        engine.add(request, engine.plan(request))
    times = []
    while engine.has_work:
        before = spent.copy()
        decoding = sum(not sequence.prefilling for sequence in engine.scheduler.running)
        prefills = decoding < len(engine.scheduler.running) or engine.scheduler.num_waiting > 0
        counts = prefills if phase == "prefill" else not prefills and decoding == args.concurrency
        started = time.perf_counter()
        engine.step()
        if counts:
            times.append(time.perf_counter() - started)
        else:
            spent.clear()
            spent.update(before)
    return (statistics.median(times) * len(times) if phase == "decode" else sum(times)), len(times)


def timed(kernels: Kernels, spent: Counter[str]) -> Kernels:
    """The same kernels with a clock around each."""

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return call

    def packed(name: str, pack: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any) -> Any:
            layer = pack(*args)
            call = clocked(NAMES[name], layer)
            call.nbytes = layer.nbytes  # type: ignore[attr-defined]
            return call

        return make

    wrapped = {
        f.name: (packed if f.name in NAMES else clocked)(f.name, getattr(kernels, f.name))
        for f in fields(kernels)
    }
    return replace(kernels, **wrapped)


if __name__ == "__main__":
    main()
