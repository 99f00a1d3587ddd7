"""A model in several processes against one: the same tokens, the same kept sets, and the bytes exchanged.

    python benchmarks/tensor_parallel.py [--processes 3] [--tokens 1000]

Bytes are those of the tensors that each process hands in. Of a tensor of n bytes that is added up over N
processes, a ring sends 2 (N - 1) / N n from each; of one that is gathered, (N - 1) n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from curkv.bench.script import Model, script
from curkv.bench.text import documentation_text
from curkv.cache.explain import Explanation
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Output, Request, SamplingParams
from curkv.models.loading import load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import table

CHUNK = 512
NEW_TOKENS = 16
EVICTING = ("snapkv", "adasnapkv", "snapcur")


@dataclass
class Measured:
    """What one engine does.

    Attributes:
        tokens: Of each request.
        explained: What each policy would keep.
        exchanged: Bytes of steps by what they were, under a name of the step.
    """

    tokens: dict[str, list[int]]
    explained: list[Explanation]
    exchanged: dict[str, Mapping[str, int]]


def main(
    model: Model = DEFAULT_MODEL,
    processes: Annotated[int, typer.Option(min=2, help="Among which the KV heads can be divided.")] = 3,
    tokens: Annotated[int, typer.Option(min=2 * CHUNK, help="Of the prompts that are evicted from.")] = 1024,
) -> None:
    """Runs the same requests in one process and in several, and prints what differs and what it took."""
    directory = str(resolve_model(model))
    ids = load_tokenizer(resolve_model(model)).encode(documentation_text()[: 20 * tokens]).ids
    one, several = (_measured(directory, n, ids, tokens) for n in (1, processes))
    alike = sum(several.tokens[name] == found for name, found in one.tokens.items())
    print(f"{processes} processes: {alike} of {len(one.tokens)} requests got the tokens of one process;")
    pairs = list(zip(one.explained, several.explained, strict=True))
    kept = sum(np.array_equal(mine.kept, theirs.kept) for mine, theirs in pairs)
    places = sum(int((mine.kept != theirs.kept).sum()) for mine, theirs in pairs)
    total = sum(mine.kept.size for mine, _ in pairs)
    print(f"{kept} of {len(pairs)} policies would keep the same, {places} of {total} places differ;")
    held = [(theirs.bytes_kept / mine.bytes_kept, mine.policy) for mine, theirs in pairs]
    print(f"bytes of the pages kept: {min(held)[0]:.2f} to {max(held)[0]:.2f} times ({max(held)[1]})\n")
    rows = [
        (name, *(f"{found.get(content, 0):,}" for content in ("sums", "heads", "numbers")))
        for name, found in several.exchanged.items()
    ]
    print(table(("step", "sums of projections", "scores of heads", "token ids"), rows))


def _measured(directory: str, processes: int, ids: list[int], tokens: int) -> Measured:
    engine = build_engine(
        EngineOptions(
            model=directory,
            weights="float32",
            kv_dtype="float32",
            device="cpu",
            kv_cache_memory=2**30,
            prefix_cache_memory=0,
            max_step_tokens=CHUNK,
            max_model_len=4 * tokens,
            tensor_parallel=processes,
        )
    )
    found = Measured({}, [], {})
    names = [name for name in policy_names() if name not in ("full", "auto")]
    plans = tuple(parse_options({"policy": name, "budget": "25%"}) for name in names)
    for outputs, _ in _steps(
        engine, Request("all", ids[:tokens], SamplingParams(0), parse_options({}), plans)
    ):
        found.explained += [explanation for output in outputs for explanation in output.explanations]
    for count in (1, 8):
        requests = [_request(f"full {i}", ids[50 * i : 50 * i + CHUNK // 8], {}) for i in range(count)]
        for outputs, step in _steps(engine, *requests):
            _note(found, outputs)
            if engine.last_stats.prompt_tokens == CHUNK:
                found.exchanged[f"{CHUNK} tokens of prompts"] = step
            elif not engine.last_stats.prompt_tokens:
                found.exchanged[f"decode, {count} at once"] = step
    for name in EVICTING:
        request = _request(name, ids[:tokens], {"policy": name, "budget": "25%"})
        for outputs, step in _steps(engine, request):
            _note(found, outputs)
            if engine.last_stats.evictions:
                found.exchanged[f"{CHUNK} tokens, and eviction of {tokens:,} with {name}"] = step
    engine.close(1.0)
    return found


def _request(name: str, prompt: list[int], kv: dict[str, Any]) -> Request:
    sampling = SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return Request(name, prompt, sampling, parse_options(kv))


def _note(found: Measured, outputs: list[Output]) -> None:
    for output in outputs:
        found.tokens.setdefault(output.request_id, []).extend(output.token_ids)


def _steps(engine: Engine, *requests: Request) -> Iterator[tuple[list[Output], Mapping[str, int]]]:
    """Outputs of each step, and the bytes that it exchanged."""
    for request in requests:
        engine.add(engine.plan(request))
    while engine.has_work:
        before = Counter(engine.last_stats.exchanged)
        outputs = engine.step()
        yield outputs, Counter(engine.last_stats.exchanged) - before


app = script(__doc__, main)

if __name__ == "__main__":
    app()
