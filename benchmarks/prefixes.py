"""Questions about one document, in turn: what the first and the later ones wait for, and what is held.

    python benchmarks/prefixes.py
    python benchmarks/prefixes.py --tokens 1000 --questions 4

Engines without and with the prefix cache take turns within one process, so that ratios hold on a noisy
machine. Answers are compared token by token with those of the engine that computes everything again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams

MIB = 2**20


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


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=3500, help="of the document")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--policy", default="compactor", help="of the compressed context, at 25 %%")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    compressed = {"policy": args.policy, "budget": "25%", "context_tokens": str(args.tokens)}
    ways = {
        "full": ({}, 0),
        "full, prefixes": ({}, None),
        f"{args.policy} 25%": (compressed, 0),
        f"{args.policy} 25%, prefixes": (compressed, None),
    }
    pool = 2**30
    engines = {
        size: build_engine(EngineOptions(model=args.model, kv_cache_memory=pool, prefix_cache_memory=size))
        for size in (0, None)
    }
    document, questions = prompts(engines[0], args.tokens, args.questions)
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, (kv, size) in ways.items():
            engines[size].drop_prefixes()
            results[name].append(serve(engines[size], document, questions, kv))
    print("| | first TTFT s | later TTFT s | peak of a later question MiB | held at the end MiB | answers |")
    print("|---|---|---|---|---|---|")
    for name, found in results.items():
        plain = results[name.removesuffix(", prefixes")]
        same = all(a.tokens == b.tokens for a, b in zip(found, plain, strict=True))
        first = statistics.median(result.ttft[0] for result in found)
        later = statistics.median(second for result in found for second in result.ttft[1:])
        peak, held = found[0].peak / MIB, found[0].held / MIB
        verdict = "same" if same else "DIFFER"
        print(f"| {name} | {first:.2f} | {later:.3f} | {peak:.1f} | {held:.1f} | {verdict} |")


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
        request = Request(f"q{i}", document + question, sampling, options)
        engine.add(engine.plan(request))
        started, answer = time.perf_counter(), []
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


if __name__ == "__main__":
    main()
