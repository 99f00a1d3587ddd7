"""From which length on streaming prefill is faster than computing the whole prompt, and what it costs.

    python benchmarks/streaming_crossover.py --weights int8

One request at a time: seconds to its first token (the least of `--rounds`), contenders in turn, and the
perplexity of the prompt's last 512 tokens, which with streaming prefill see what was kept of those before.
"""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer
from tqdm import tqdm

from curkv.bench.script import Model, script, submit
from curkv.bench.text import token_spans
from curkv.cache.options import EvictionOptions
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.evaluation.variants import parse_variant
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

POLICIES = ("snapcur", "curdkv", "streaming-llm")
TAIL = 512


def main(
    model: Model = DEFAULT_MODEL,
    weights: Weights = "int8",
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens; repeatable. [1000 2000 4000 8000]")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"Repeatable. [{', '.join(POLICIES)}]")] = None,
    budget: str = "25%",
    rounds: int = 3,
) -> None:
    """Times and scores every contender at every length, and prints a table."""
    engine = build_engine(
        EngineOptions(model=model, weights=weights, kv_cache_memory=2**30, prefix_cache_memory=0)
    )
    contenders = {"full": parse_options({})}
    for name in policy or POLICIES:
        raw = parse_variant(name, budget).raw
        contenders[f"{name} {budget}, exact"] = parse_options(raw)
        contenders[f"{name} {budget}, streaming"] = parse_options({**raw, "prefill": "streaming"})
    print(head(["tokens", "contender", "seconds", "to full", f"perplexity of the last {TAIL}", "to full"]))
    for tokens in length or (1000, 2000, 4000, 8000):
        (prompt,) = token_spans(engine.info.tokenizer, 1, tokens, seed=0)
        least = dict.fromkeys(contenders, math.inf)
        for name in tqdm([*contenders] * rounds, disable=None, leave=False, desc=f"{tokens} tokens"):
            least[name] = min(least[name], first_token(engine, prompt, contenders[name]))
        perplexity = {name: tail_perplexity(engine, prompt, kv) for name, kv in contenders.items()}
        for name in contenders:
            seconds, loss = least[name], perplexity[name]
            speed, quality = seconds / least["full"], loss / perplexity["full"]
            found = f"{seconds:.2f}", f"{speed:.2f}", f"{loss:.2f}", f"{quality:.3f}"
            print(line([f"{tokens:,}", name, *found]))


def first_token(engine: Engine, prompt: list[int], kv: EvictionOptions) -> float:
    """Seconds until a prompt's first token."""
    submit(engine, "timed", prompt, SamplingParams(1, temperature=0.0, ignore_eos=True), kv)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def tail_perplexity(engine: Engine, prompt: list[int], kv: EvictionOptions) -> float:
    """Perplexity of the last `TAIL` tokens of a prompt."""
    sampling = SamplingParams(1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    submit(engine, "scored", prompt, sampling, kv)
    found: list[float] = []
    while engine.has_work:
        for output in engine.step():
            found += [token.logprob for token in output.prompt_logprobs or []]
    return math.exp(-sum(found[-TAIL:]) / TAIL)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
