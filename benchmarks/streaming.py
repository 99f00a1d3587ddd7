"""A prompt four times as large as the pool: streaming prefill, and whether a needle survives it.

python benchmarks/streaming.py
"""

from __future__ import annotations

import argparse
import time

from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import InvalidRequest, Request, SamplingParams
from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Recipe, Sample, string_match_all
from curkv.evaluation.variants import parse_variant

MIB = 2**20
POLICIES = (
    "streaming-llm",
    "curdkv",
    "snapcur",
    "h2o",
    "keydiff",
    "cur-exact",
    "compactor allocation=adaptive",
)
CHUNK = 512


def main() -> None:
    """Serves needles at several depths under each policy and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--pool-tokens", type=int, default=2000, help="tokens that the pool holds")
    parser.add_argument("--depth", type=int, action="append", help="tenths of the context [1 5 9]")
    parser.add_argument("--policy", action="append", help=f"repeatable [{' '.join(POLICIES)}]")
    args = parser.parse_args()

    shape = build_engine(
        EngineOptions(model=args.model, kv_cache_memory=2**28, prefix_cache_memory=0)
    ).kv.layout
    pool = shape.sequence_pages(args.pool_tokens) * shape.page_bytes
    engine = build_engine(EngineOptions(model=args.model, kv_cache_memory=pool, prefix_cache_memory=0))
    budget = args.pool_tokens - CHUNK - 2 * shape.page_size
    print(f"{args.prompt_tokens} tokens through {pool / MIB:.1f} MiB, budget {budget}, chunks of {CHUNK}\n")
    print("| policy | needle at | answer | found | peak MiB | seconds |\n|---|---|---|---|---|---|")
    for policy in args.policy or POLICIES:
        for depth in args.depth or (1, 5, 9):
            sample = make_sample(
                Recipe("needle", args.prompt_tokens, depth, "documentation"),
                lambda text: len(engine.info.tokenizer.encode(text, add_special_tokens=False).ids),
            )
            print(
                f"| `{policy}` | {sample.depth:.0%} | {_serve(engine, sample, policy, budget)} |", flush=True
            )


def _serve(engine: Engine, sample: Sample, policy: str, budget: int) -> str:
    """Cells of the table; a pool that would hold the whole prompt is refused."""
    prompt = engine.info.tokenizer.encode(sample.context + sample.question, add_special_tokens=False).ids
    sampling = SamplingParams(sample.max_new_tokens, temperature=0.0)
    raw = parse_variant(policy, str(budget)).raw
    try:
        engine.plan(Request("exact", prompt, sampling, parse_options(raw)))
        raise SystemExit("the pool holds the whole prompt: choose a smaller --pool-tokens")
    except InvalidRequest:
        options = parse_options({**raw, "prefill": "streaming", "prefill_chunk": CHUNK})
    request = Request("streaming", prompt, sampling, options)
    engine.add(engine.plan(request))
    started, text, report = time.perf_counter(), "", None
    while engine.has_work:
        for output in engine.step():
            text, report = text + output.text, output.kv
    seconds = time.perf_counter() - started
    assert report is not None
    found = "yes" if string_match_all(text, sample.answers) == 1 else "no"
    return f"{' '.join(text.split())[:24]} | {found} | {report.peak_bytes / MIB:.1f} | {seconds:.0f}"


if __name__ == "__main__":
    main()
