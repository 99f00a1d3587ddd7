"""A prompt four times as large as the pool: streaming prefill, and whether a needle survives it.

python benchmarks/streaming.py
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from curkv.bench.script import Model, script, submit
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import InvalidRequest, Request, SamplingParams
from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Recipe, Sample, string_match_all
from curkv.evaluation.variants import parse_variant
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

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


def main(
    model: Model = DEFAULT_MODEL,
    prompt_tokens: int = 8000,
    pool_tokens: Annotated[int, typer.Option(help="Tokens that the pool holds.")] = 2000,
    depth: Annotated[
        list[int] | None, typer.Option(help="Tenths of the context; repeatable. [1 5 9]")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"Repeatable. [{', '.join(POLICIES)}]")] = None,
) -> None:
    """Serves needles at several depths under each policy and prints a table."""
    shape = build_engine(
        EngineOptions(model=model, weights="float32", kv_cache_memory=2**28, prefix_cache_memory=0)
    ).kv.layout
    pool = shape.sequence_pages(pool_tokens) * shape.page_bytes
    engine = build_engine(
        EngineOptions(model=model, weights="float32", kv_cache_memory=pool, prefix_cache_memory=0)
    )
    budget = pool_tokens - CHUNK - 2 * shape.page_size
    print(f"{prompt_tokens} tokens through {pool / MIB:.1f} MiB, budget {budget}, chunks of {CHUNK}\n")
    print(head(["policy", "needle at", "answer", "found", "peak MiB", "seconds"]))
    for name in policy or POLICIES:
        for tenths in depth or (1, 5, 9):
            sample = make_sample(
                Recipe("needle", prompt_tokens, tenths, "documentation"),
                lambda text: len(engine.info.tokenizer.encode(text, add_special_tokens=False).ids),
            )
            cells = _serve(engine, sample, name, budget)
            print(line([f"`{name}`", f"{sample.asked[0].depth:.0%}", *cells]), flush=True)


def _serve(engine: Engine, sample: Sample, policy: str, budget: int) -> list[str]:
    """Cells of the table; a pool that would hold the whole prompt is refused."""
    prompt = engine.info.tokenizer.encode(
        sample.context + sample.asked[0].question, add_special_tokens=False
    ).ids
    sampling = SamplingParams(sample.asked[0].max_new_tokens, temperature=0.0)
    raw = parse_variant(policy, str(budget)).raw
    try:
        engine.plan(Request("exact", prompt, sampling, parse_options(raw)))
        raise SystemExit("the pool holds the whole prompt: choose a smaller --pool-tokens")
    except InvalidRequest:
        options = parse_options({**raw, "prefill": "streaming", "prefill_chunk": CHUNK})
    submit(engine, "streaming", prompt, sampling, options)
    started, text, report = time.perf_counter(), "", None
    while engine.has_work:
        for output in engine.step():
            text, report = text + output.text, output.kv
    seconds = time.perf_counter() - started
    assert report is not None
    found = "yes" if string_match_all(text, sample.asked[0].answers) == 1 else "no"
    return [" ".join(text.split())[:24], found, f"{report.peak_bytes / MIB:.1f}", f"{seconds:.0f}"]


app = script(__doc__, main)

if __name__ == "__main__":
    app()
