"""Questions about one document, in turn: what the first and the later ones wait for, and what is held.

    python benchmarks/prefixes.py
    python benchmarks/prefixes.py --tokens 1000 --questions 4

Engines without and with the prefix cache take turns within one process, so that ratios hold on a noisy
machine. Answers are compared token by token with those of the engine that computes everything again.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from curkv.bench.script import Model, script, submit
from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

MIB = 2**20
COLUMNS = (
    "",
    "first TTFT s",
    "later TTFT s",
    "peak of a later question MiB",
    "held at the end MiB",
    "answers",
)


@dataclass
class Result:
    """One way to serve the questions.

    Attributes:
        ttft: seconds to the first token of each question.
        tokens: what was generated.
        peak: most bytes that the sequence of a question after the first one used.
        held: bytes of the prefixes at the end.
    """

    ttft: list[float]
    tokens: list[list[int]]
    peak: int = 0
    held: int = 0


def main(
    model: Model = DEFAULT_MODEL,
    tokens: Annotated[int, typer.Option(help="Of the document.")] = 3500,
    questions: int = 8,
    policy: Annotated[str, typer.Option(help="Of the compressed context, at 25 %.")] = "compactor",
    runs: int = 1,
) -> None:
    """Prints a table."""
    compressed = {"policy": policy, "budget": "25%", "context_tokens": str(tokens)}
    ways: dict[str, tuple[dict[str, str], int | None]] = {
        "full": ({}, 0),
        "full, prefixes": ({}, None),
        f"{policy} 25%": (compressed, 0),
        f"{policy} 25%, prefixes": (compressed, None),
    }
    pool = 2**30
    engines = {
        size: build_engine(
            EngineOptions(model=model, weights="float32", kv_cache_memory=pool, prefix_cache_memory=size)
        )
        for size in (0, None)
    }
    document, asked = prompts(engines[0], tokens, questions)
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, (kv, size) in ways.items():
            engines[size].drop_prefixes()
            results[name].append(serve(engines[size], document, asked, kv))
    print(head(COLUMNS))
    for name, found in results.items():
        plain = results[name.removesuffix(", prefixes")]
        same = all(a.tokens == b.tokens for a, b in zip(found, plain, strict=True))
        first = statistics.median(result.ttft[0] for result in found)
        later = statistics.median(second for result in found for second in result.ttft[1:])
        peak, held = found[0].peak / MIB, found[0].held / MIB
        verdict = "same" if same else "DIFFER"
        print(line([name, f"{first:.2f}", f"{later:.3f}", f"{peak:.1f}", f"{held:.1f}", verdict]))


def prompts(engine: Engine, tokens: int, count: int) -> tuple[list[int], list[list[int]]]:
    """A document, and questions of about 25 tokens."""
    encode = engine.info.tokenizer.encode
    document = encode(documentation_text()[: 8 * tokens]).ids[:tokens]
    if len(document) < tokens:
        raise SystemExit(f"the text has only {len(document)} tokens")
    topics = ["lists", "strings", "numbers", "files", "classes", "loops", "modules", "errors"]
    ask = "\n\nQuestion {}: what does the text above say about {}, in one sentence? Answer:"
    return document, [encode(ask.format(i + 1, topics[i % len(topics)])).ids for i in range(count)]


def serve(engine: Engine, document: list[int], questions: list[list[int]], kv: dict[str, str]) -> Result:
    """Asks one question after the other."""
    options, result = parse_options(kv), Result([], [])
    for i, question in enumerate(questions):
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        submit(engine, f"q{i}", document + question, sampling, options)
        started = time.perf_counter()
        answer: list[int] = []
        while engine.has_work:
            for output in engine.step():
                if not answer:
                    result.ttft.append(time.perf_counter() - started)
                answer += output.token_ids
                if output.kv is not None:
                    result.peak = max(result.peak, output.kv.peak_bytes if i else 0)
        result.tokens.append(answer)
    result.held = engine.kv.usage.prefix_bytes
    return result


app = script(__doc__, main)

if __name__ == "__main__":
    app()
