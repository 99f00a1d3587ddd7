"""Where a step's time goes: every operation of prefill and decode, and decode steps run as one call.

python benchmarks/operations.py --weights int8
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from curkv.bench.text import token_spans
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams
from curkv.kernels.cpu import workers
from curkv.server.process import keep_freed_memory

NAMES = {"linear.cpu": "products of linear layers", "linear.rounded_rows": "rms_norm, silu_mul and rounding"}


def main() -> None:
    """Runs the requests with a clock around each launch and prints a table; then runs decode recorded."""
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

    keep_freed_memory()  # as a server does
    spent: Counter[str] = Counter()
    options = EngineOptions(
        model=args.model,
        weights=args.weights,
        kv_dtype=args.kv_dtype,
        kv_cache_memory=2**31,
        prefix_cache_memory=0,
    )
    recorded, engine = build_engine(options), build_engine(options)
    plain = workers._run, workers._run_alone
    time_launches(spent)
    engine.runner.replay = None
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
    workers._run, workers._run_alone = plain
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
    prompts = token_spans(engine.info.tokenizer, args.concurrency, args.prompt_tokens, seed=0)
    for i, prompt in enumerate(prompts):
        request = Request(str(i), prompt, sampling, parse_options(kv))
        engine.add(engine.plan(request))
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


def time_launches(spent: Counter[str]) -> None:
    """Puts a clock around what runs launches."""

    def clocked(run: Callable[..., None], function: Callable[..., int]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            started = time.perf_counter()
            run(*args)
            spent[name(function(*args))] += time.perf_counter() - started

        return timed

    names: dict[int, str] = {}

    def name(address: int) -> str:
        if address not in names:
            worker = next(worker for worker in workers._keep if worker.address == address)
            module = worker.__wrapped__.__module__.removeprefix("curkv.kernels.")
            names[address] = NAMES.get(module, module.split(".")[0])
        return names[address]

    workers._run = clocked(workers._run, lambda entry, *_: ctypes.c_int64.from_address(entry).value)
    workers._run_alone = clocked(workers._run_alone, lambda function, *_: function)


if __name__ == "__main__":
    main()
