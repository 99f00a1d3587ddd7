"""What eviction saves and costs: bytes held, requests that run at once, share of the prefill's time.

python benchmarks/eviction.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from curkv.bench.script import Model, script, submit
from curkv.bench.text import token_spans
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

MIB = 2**20
CHOICES: dict[str, dict[str, str]] = {
    "full": {},
    "curdkv 50%": {"policy": "curdkv", "budget": "50%"},
    "curdkv 25%": {"policy": "curdkv", "budget": "25%"},
    "adacurdkv 25%": {"policy": "adacurdkv", "budget": "25%"},
    "curdkv 25% (paper)": {"policy": "curdkv", "budget": "25%", "preset": "paper"},
}


def main(
    model: Model = DEFAULT_MODEL,
    prompt_tokens: int = 2000,
    new_tokens: int = 16,
    plot: Annotated[Path | None, typer.Option(help="Draw the pool over time into this file.")] = None,
) -> None:
    """Runs the three measurements and prints their tables."""
    engine = build_engine(EngineOptions(model=model, kv_cache_memory=2**31, prefix_cache_memory=0))
    print(f"8 requests of {prompt_tokens} + {new_tokens} tokens, {engine.kv.layout.format.name} cache\n")
    print(head(["policy", "peak MiB", "after prefill MiB", "share of full", "eviction / prefill time"]))
    full, histories = 0, {}
    for name, options in CHOICES.items():
        history: list[tuple[float, int]] = []
        peak, held, share = _memory(engine, prompt_tokens, new_tokens, options, history)
        histories[name] = history
        full = full or held
        sizes = (f"{size / MIB:.1f}" for size in (peak, held))
        print(line([name, *sizes, f"{held / full:.1%}", f"{share:.2%}"]))

    if plot:
        _plot(histories, plot, prompt_tokens)
    layout = engine.kv.layout
    three = 3 * layout.sequence_pages(prompt_tokens + new_tokens) * layout.page_bytes
    small = build_engine(EngineOptions(model=model, kv_cache_memory=three, prefix_cache_memory=0))
    print(f"\nTwelve requests in a pool for three full ones ({three / MIB:.0f} MiB)\n")
    print(head(["policy", "most at once", "preemptions", "seconds"]))
    for name, options in CHOICES.items():
        most, preemptions, seconds = _crowd(small, prompt_tokens, new_tokens, options)
        print(line([name, most, preemptions, f"{seconds:.1f}"]))


def _requests(
    engine: Engine, count: int, prompt_tokens: int, new_tokens: int, options: dict[str, str]
) -> None:
    sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(token_spans(engine.info.tokenizer, count, prompt_tokens, seed=0)):
        submit(engine, str(i), prompt, sampling, parse_options(options))


def _memory(
    engine: Engine,
    prompt_tokens: int,
    new_tokens: int,
    options: dict[str, str],
    history: list[tuple[float, int]],
) -> tuple[int, int, float]:
    """Bytes used at the peak and after the last prefill; eviction's share of the prefill's time."""
    _requests(engine, 8, prompt_tokens, new_tokens, options)
    peak = held = 0
    prefill = evicting = 0.0
    begun = time.perf_counter()
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        stats = engine.last_stats
        if stats.prompt_tokens:
            prefill += time.perf_counter() - started
            evicting += sum(e.seconds for e in stats.evictions)
            held = stats.used_bytes
        freed = sum(e.pages_freed for e in stats.evictions) * engine.kv.page_bytes
        peak = max(peak, stats.used_bytes + freed)
        history += [
            (time.perf_counter() - begun, size) for size in (stats.used_bytes + freed, stats.used_bytes)
        ]
    return peak, held, evicting / prefill


def _plot(histories: dict[str, list[tuple[float, int]]], file: Path, prompt_tokens: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, history in histories.items():
        seconds, sizes = zip(*history, strict=True)
        axes.plot(seconds, [size / MIB for size in sizes], label=name)
    axes.set(xlabel="seconds", ylabel="KV cache in use, MiB", ylim=(0, None))
    axes.set_title(f"8 requests of {prompt_tokens:,} tokens arrive together", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


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


app = script(__doc__, main)

if __name__ == "__main__":
    app()
