"""From which length on streaming prefill is faster than computing the whole prompt, and what it costs.

    python benchmarks/streaming_crossover.py --weights int8

One request at a time: seconds to its first token (the least of `--rounds`), contenders in turn, and the
perplexity of the prompt's last 512 tokens, which with streaming prefill see what was kept of those before.
"""

from __future__ import annotations

import argparse
import math
import time

from tqdm import tqdm

from curkv.bench.text import token_spans
from curkv.cache.options import EvictionOptions
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams
from curkv.evaluation.variants import parse_variant

POLICIES = ("snapcur", "curdkv", "streaming-llm")
TAIL = 512


def main() -> None:
    """Times and scores every contender at every length, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", default="int8", choices=["float32", "int8", "int4"])
    parser.add_argument("--length", type=int, action="append", help="repeatable [1000 2000 4000 8000]")
    parser.add_argument("--policy", action="append", help=f"repeatable [{' '.join(POLICIES)}]")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    engine = build_engine(
        EngineOptions(model=args.model, weights=args.weights, kv_cache_memory=2**30, prefix_cache_memory=0)
    )
    contenders = {"full": parse_options({})}
    for policy in args.policy or POLICIES:
        raw = parse_variant(policy, args.budget).raw
        contenders[f"{policy} {args.budget}, exact"] = parse_options(raw)
        contenders[f"{policy} {args.budget}, streaming"] = parse_options({**raw, "prefill": "streaming"})
    print("| tokens | contender | seconds | to full | perplexity of the last 512 | to full |")
    print("|---|---|---|---|---|---|")
    for length in args.length or (1000, 2000, 4000, 8000):
        (prompt,) = token_spans(engine.info.tokenizer, 1, length, seed=0)
        least = dict.fromkeys(contenders, math.inf)
        for name in tqdm([*contenders] * args.rounds, disable=None, leave=False, desc=f"{length} tokens"):
            least[name] = min(least[name], first_token(engine, prompt, contenders[name]))
        perplexity = {name: tail_perplexity(engine, prompt, kv) for name, kv in contenders.items()}
        for name in contenders:
            seconds, loss = least[name], perplexity[name]
            ratios = seconds / least["full"], loss / perplexity["full"]
            print(f"| {length:,} | {name} | {seconds:.2f} | {ratios[0]:.2f} | {loss:.2f} | {ratios[1]:.3f} |")


def first_token(engine: Engine, prompt: list[int], kv: EvictionOptions) -> float:
    """Seconds until a prompt's first token."""
    request = Request("timed", prompt, SamplingParams(1, temperature=0.0, ignore_eos=True), kv)
    engine.add(engine.plan(request))
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def tail_perplexity(engine: Engine, prompt: list[int], kv: EvictionOptions) -> float:
    """Perplexity of the last `TAIL` tokens of a prompt."""
    sampling = SamplingParams(1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    request = Request("scored", prompt, sampling, kv)
    engine.add(engine.plan(request))
    found: list[float] = []
    while engine.has_work:
        for output in engine.step():
            found += [token.logprob for token in output.prompt_logprobs or []]
    return math.exp(-sum(found[-TAIL:]) / TAIL)


if __name__ == "__main__":
    main()
