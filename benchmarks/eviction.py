"""What eviction saves and costs: bytes held, requests that run at once, share of the prefill's time.

python benchmarks/eviction.py
"""

from __future__ import annotations

import argparse
import time

from curkv.bench.text import token_spans
from curkv.cache.options import parse_options
from curkv.engine.build import EngineOptions, build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams

MIB = 2**20
CHOICES: dict[str, dict[str, str]] = {
    "full": {},
    "curdkv 50%": {"policy": "curdkv", "budget": "50%"},
    "curdkv 25%": {"policy": "curdkv", "budget": "25%"},
    "adacurdkv 25%": {"policy": "adacurdkv", "budget": "25%"},
    "curdkv 25% (paper)": {"policy": "curdkv", "budget": "25%", "preset": "paper"},
}


def main() -> None:
    """Runs the three measurements and prints their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    engine = build_engine(EngineOptions(args.model, kv_cache_bytes=2**31))
    print(f"8 requests of {args.prompt_tokens} + {args.new_tokens} tokens, {engine.kv.layout.dtype} cache\n")
    print("| policy | peak MiB | after prefill MiB | final MiB | share of full | eviction / prefill time |")
    print("|---|---|---|---|---|---|")
    full = 0
    for name, options in CHOICES.items():
        peak, held, final, share = _memory(engine, args.prompt_tokens, args.new_tokens, options)
        full = full or final
        print(
            f"| {name} | {peak / MIB:.1f} | {held / MIB:.1f} | {final / MIB:.1f} | {final / full:.1%} | {share:.2%} |"
        )

    layout = engine.kv.layout
    three = 3 * layout.sequence_pages(args.prompt_tokens + args.new_tokens) * layout.page_bytes
    small = build_engine(EngineOptions(args.model, kv_cache_bytes=three))
    print(f"\nTwelve requests in a pool for three full ones ({three / MIB:.0f} MiB)\n")
    print("| policy | most at once | preemptions | seconds |\n|---|---|---|---|")
    for name, options in CHOICES.items():
        most, preemptions, seconds = _crowd(small, args.prompt_tokens, args.new_tokens, options)
        print(f"| {name} | {most} | {preemptions} | {seconds:.1f} |")


def _requests(
    engine: Engine, count: int, prompt_tokens: int, new_tokens: int, options: dict[str, str]
) -> None:
    sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(token_spans(engine.tokenizer, count, prompt_tokens, seed=0)):
        request = Request(str(i), prompt, sampling, parse_options(options))
        engine.add(request, engine.plan(request))


def _memory(
    engine: Engine, prompt_tokens: int, new_tokens: int, options: dict[str, str]
) -> tuple[int, int, int, float]:
    """Bytes of the pool at their peak, when the last prefill has ended and at the last step; eviction's share."""
    _requests(engine, 8, prompt_tokens, new_tokens, options)
    held, prefill, evicting = [], 0.0, 0.0
    after_prefill = 0
    while engine.has_work:
        started = time.perf_counter()
        busy = any(s.prefilling for s in engine.scheduler.running) or engine.scheduler.num_waiting > 0
        engine.step()
        if busy or not held:
            prefill += time.perf_counter() - started
            evicting += sum(e.seconds for e in engine.last_stats.evictions)
            after_prefill = engine.last_stats.used_bytes
        if engine.has_work:
            held.append(engine.last_stats.used_bytes)
    peak = max(held + [max(r.kv.peak_bytes for r in engine.last_stats.finished if r.kv)])
    return peak, after_prefill, held[-1], evicting / prefill


def _crowd(
    engine: Engine, prompt_tokens: int, new_tokens: int, options: dict[str, str]
) -> tuple[int, int, float]:
    """Most requests that ran at once, preemptions and seconds for twelve of them."""
    _requests(engine, 12, prompt_tokens, new_tokens * 4, options)
    started, most, preemptions = time.perf_counter(), 0, 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.last_stats.running)
        preemptions += engine.last_stats.preemptions
    return most, preemptions, time.perf_counter() - started


if __name__ == "__main__":
    main()
