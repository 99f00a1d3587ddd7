"""curkv beside llama.cpp on one GGUF file: greedy tokens, and the probabilities of a text's tokens.

    FILE=$(curkv model fetch gemma-3-270m)/gemma-3-270m-q4_k_m.gguf
    benchmarks/peers/llama.sh serve 8080 --model $FILE &
    python benchmarks/same_file.py http://127.0.0.1:8080 --model gemma-3-270m

Both continue 20 prompts greedily. Where they part, the gap says how much likelier curkv finds its own token
than the other one's (natural logarithms): llama.cpp multiplies what it rounds to 8 bits, and keeps keys and
values in float16. Then both are asked for the probability of each of the last tokens of windows of a text, of
which llama.cpp's server tells the 1,000 likeliest; a token that is not among them counts for neither.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import httpx
import torch
import typer
from tqdm import tqdm

from curkv.bench.script import Model, prompt_logits, script, submit
from curkv.cache.options import EvictionOptions
from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import token_windows
from curkv.tables import head, line

PROMPTS = """The capital of France is
Water boils at a temperature of
Once upon a time, in a small village,
The three states of matter are
def fibonacci(n):
import numpy as np
The quick brown fox
In 1969, the first human
To make bread you need flour,
Q: What is the largest planet? A:
The opposite of hot is
1, 2, 3, 4, 5,
Dear Sir or Madam,
SELECT name, price FROM
Photosynthesis is the process by which
The French word for cat is
Monday, Tuesday, Wednesday,
The first president of the United States was
A triangle has three sides, and a square has
The meaning of life is"""
LIKELIEST = 1000


@torch.inference_mode()
def main(
    url: Annotated[str, typer.Argument(help="llama.cpp's server.")],
    model: Model = "gemma-3-270m",
    weights: Annotated[list[str] | None, typer.Option(help="Repeatable. [float32, published]")] = None,
    generated: Annotated[int, typer.Option(help="Tokens that continue a prompt.")] = 48,
    corpus: Annotated[str, typer.Option(help="Where the text is from.")] = "documentation",
    windows: int = 2,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    scored: Annotated[int, typer.Option(help="Of these, tokens whose probability is asked for.")] = 128,
) -> None:
    """Compares both and prints two tables."""
    engines = {name: engine_of(model, name, length) for name in weights or ["float32", "published"]}
    for name, engine in engines.items():
        continuations(url, name, engine, generated)
    texts = token_windows(next(iter(engines.values())).info.tokenizer, load_corpus(corpus), length, windows)
    other = [likelihoods(url, ids.tolist(), scored) for ids in tqdm(texts, disable=None)]
    print(head(["weights", "tokens", "perplexity", "llama.cpp", "ratio", "mean |difference|"]))
    for name, engine in engines.items():
        own, its = [], []
        for ids, row in zip(texts, other, strict=True):
            logprobs = prompt_logits(engine)(ids).float().log_softmax(-1)
            for place, found in row.items():
                own.append(float(logprobs[place - 1, ids[place]]))
                its.append(found)
        mean, its_mean = sum(own) / len(own), sum(its) / len(its)
        apart = sum(abs(a - b) for a, b in zip(own, its, strict=True)) / len(own)
        quality = math.exp(-mean), math.exp(-its_mean), math.exp(its_mean - mean), apart
        print(line([name, str(len(own)), *(f"{value:.4f}" for value in quality)]), flush=True)


def engine_of(model: str, weights: Weights, length: int) -> Engine:
    """An engine over a float32 cache."""
    return build_engine(
        EngineOptions(
            model=model,
            weights=weights,
            kv_cache_memory=2**28,
            prefix_cache_memory=0,
            kv_dtype="float32",
            max_model_len=max(length, 256),
        )
    )


def continuations(url: str, name: str, engine: Engine, generated: int) -> None:
    """Prints how far both agree on each prompt."""
    print(head(["weights", "prompt", "same tokens", "gap at the first other one", "llama.cpp's"]))
    same = 0
    for prompt in PROMPTS.splitlines():
        ids = engine.info.tokenizer.encode(prompt).ids
        own, logprobs = greedy(engine, prompt, ids, generated)
        answer = asked(url, prompt=ids, n_predict=generated, n_probs=20)["completion_probabilities"]
        its = [token["id"] for token in answer]
        place = next((i for i, (a, b) in enumerate(zip(own, its, strict=False)) if a != b), None)
        if place is None:
            same += 1
            continue
        gap = logprobs[place].get(own[place], math.nan) - logprobs[place].get(its[place], math.nan)
        listed = {one["id"]: one["logprob"] for one in answer[place]["top_logprobs"]}
        its_gap = listed.get(its[place], math.nan) - listed.get(own[place], math.nan)
        print(line([name, prompt, f"{place} of {generated}", f"{gap:.3f}", f"{its_gap:.3f}"]), flush=True)
    print(line([name, "all others", f"{same} prompts to the end", "", ""]), flush=True)


def greedy(
    engine: Engine, name: str, prompt: list[int], generated: int
) -> tuple[list[int], list[dict[int, float]]]:
    """The tokens that follow, and at each place the logarithms of the likeliest ones' probabilities."""
    sampling = SamplingParams(max_tokens=generated, temperature=0.0, ignore_eos=True, logprobs=20)
    submit(engine, name, prompt, sampling, EvictionOptions())
    tokens: list[int] = []
    logprobs: list[dict[int, float]] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
            logprobs += [dict(one.top) for one in output.logprobs or []]
    return tokens, logprobs


def likelihoods(url: str, ids: list[int], scored: int) -> dict[int, float]:
    """llama.cpp's log-probability of each of the last tokens that is among the likeliest, by place."""
    found = {}
    for place in range(len(ids) - scored, len(ids)):
        (token,) = asked(url, prompt=ids[:place], n_predict=1, n_probs=LIKELIEST)["completion_probabilities"]
        listed = {one["id"]: one["logprob"] for one in token["top_logprobs"]}
        if ids[place] in listed:
            found[place] = float(listed[ids[place]])
    return found


def asked(url: str, **body: Any) -> dict[str, Any]:
    """The answer of llama.cpp's server to a greedy completion, with the probabilities before sampling."""
    settings = {"temperature": 0, "ignore_eos": True, "cache_prompt": True}
    response = httpx.post(f"{url}/completion", json={**settings, **body}, timeout=120)
    answer: dict[str, Any] = response.raise_for_status().json()
    return answer


app = script(__doc__, main)

if __name__ == "__main__":
    app()
