"""What each policy costs beside prefill: observing queries, then scoring, selecting and compacting.

    python benchmarks/scoring.py

A prompt is prefilled with every kind of observation that policies ask for, and without any, in turns; each
policy then evicts forks of the prompt, to a quarter. Medians of three count. Shares are of the prefill
without observation; that of observing is a difference of two prefills that follow each other. For a policy
that has the model repeat the prompt the repetition is what observing costs, and a draft of an answer is part
of it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from curkv.bench.script import Model, script
from curkv.bench.text import token_spans
from curkv.cache.eviction import Eviction, evict, select
from curkv.cache.observations import Needs
from curkv.cache.options import EvictionOptions
from curkv.cache.parsing import parse_options, settle
from curkv.cache.plan import resolve
from curkv.cache.policies import policy_names
from curkv.cache.view import CacheView
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.draft import look_ahead
from curkv.engine.engine import Engine
from curkv.engine.repetition import Repetition
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import table

ROUNDS = 3
CHUNK = 512


def main(
    model: Model = DEFAULT_MODEL,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable. [2000 4000 8000]")] = None,
) -> None:
    """Runs the measurement and prints its table."""
    lengths = length or [2000, 4000, 8000]
    engine = build_engine(EngineOptions(model=model, kv_cache_memory=2**31, prefix_cache_memory=0))
    policies = {
        name: parse_options({"policy": name, "budget": "25%"})
        for name in policy_names()
        if name not in ("full", "auto")
    }
    columns = [_measure(engine, tokens, policies) for tokens in lengths]
    names = [
        f"{tokens} tokens (prefill {seconds:.1f} s)"
        for tokens, (seconds, _) in zip(lengths, columns, strict=True)
    ]
    print("Share of prefill: evicting + observing\n")
    print(table(["policy", *names], ([f"`{p}`", *(cells[p] for _, cells in columns)] for p in policies)))


def _measure(
    engine: Engine, length: int, policies: dict[str, EvictionOptions]
) -> tuple[float, dict[str, str]]:
    """Seconds of the prefill without observation, and a table cell for each policy."""
    [prompt] = token_spans(engine.info.tokenizer, 1, length, seed=0)
    by_needs: dict[Needs, list[str]] = {}
    for name, options in policies.items():
        by_needs.setdefault(settle(options).needs, []).append(name)
    engine.kv.free(_prefill(engine, prompt, Needs())[0])
    cells, references = {}, []
    for needs, names in tqdm(by_needs.items(), desc=f"{length} tokens", leave=False):
        slot, extra, reference = _observe(engine, prompt, needs)
        references.append(reference)
        view = engine.runner.attention.view(slot)
        if needs.repetition:
            scores, extra = _repeat(engine, slot, prompt)
            view = replace(view, repetition=scores)
        drafted = max(resolve(policies[name], prompt, engine.kv.layout).draft_tokens for name in names)
        if drafted:
            scores, seconds = _draft(engine, slot, prompt, drafted)
            view, extra = replace(view, draft=scores), extra + seconds
        observing = "" if needs.query_agnostic else f" + {extra / reference:.1%}"
        for name in names:
            times = (_evict(engine, slot, view, prompt, policies[name]) for _ in range(ROUNDS))
            cells[name] = f"{median(times) / reference:.2%}{observing}"
        engine.kv.free(slot)
    return median(references), cells


def _observe(engine: Engine, prompt: list[int], needs: Needs) -> tuple[int, float, float]:
    """Prefills with an observation and without in turns.

    Returns:
        The slot of the last one with it, the seconds that it takes more, and those of a prefill without.
    """
    extra, references = [], []
    for number in range(ROUNDS):
        plain, reference = _prefill(engine, prompt, Needs())
        engine.kv.free(plain)
        slot, seconds = _prefill(engine, prompt, needs)
        if number < ROUNDS - 1:
            engine.kv.free(slot)
        extra.append(seconds - reference)
        references.append(reference)
    return slot, median(extra), median(references)


def _prefill(engine: Engine, prompt: list[int], needs: Needs) -> tuple[int, float]:
    """Computes a prompt in chunks; its slot, and seconds."""
    slot, started = engine.kv.add_sequence(needs), time.perf_counter()
    for start in range(0, len(prompt), CHUNK):
        chunk = prompt[start : start + CHUNK]
        engine.runner.run([slot], [chunk], [start])
    return slot, time.perf_counter() - started


def _repeat(engine: Engine, slot: int, prompt: list[int]) -> tuple[Tensor, float]:
    """What a repetition pays to the prompt's tokens, and seconds."""
    fork, repetition = engine.kv.fork(slot, observe=False), Repetition(prompt, engine.info)
    started = time.perf_counter()
    while not repetition.done:
        repetition.advance(engine.runner, fork)
    seconds = time.perf_counter() - started
    engine.kv.free(fork)
    return repetition.scores, seconds


def _draft(engine: Engine, slot: int, prompt: list[int], count: int) -> tuple[Tensor, float]:
    """What a draft pays to the prompt's tokens, and seconds."""
    fork, first = engine.kv.fork(slot, observe=False), torch.tensor(prompt[-1:])
    started = time.perf_counter()
    paid = look_ahead(engine.runner, fork, first, len(prompt), count)
    seconds = time.perf_counter() - started
    engine.kv.free(fork)
    return paid, seconds


def _evict(engine: Engine, slot: int, view: CacheView, prompt: list[int], options: EvictionOptions) -> float:
    """Seconds to score, select and move what a fork keeps to pages of its own."""
    plan = resolve(options, prompt, engine.kv.layout)
    fork = engine.kv.fork(slot, observe=False)
    started = time.perf_counter()
    evict(engine.kv, [Eviction(fork, view, plan, *select(view, plan, engine.kv.kernels))])
    seconds = time.perf_counter() - started
    engine.kv.free(fork)
    return seconds


app = script(__doc__, main)

if __name__ == "__main__":
    app()
