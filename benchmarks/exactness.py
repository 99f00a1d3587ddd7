"""Greedy tokens against transformers in float32: with the full cache they have to be the same.

    python benchmarks/exactness.py [--prompts 32] [--new-tokens 16]

Runs every prompt alone and all of them batched together, at several chunk sizes, with a float32 cache. Then,
with 16-bit caches, reports where the first token differs and how close the logits were there.
"""

from __future__ import annotations

import itertools
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import PreTrainedModel

from curkv.bench import baseline
from curkv.bench.script import Model, script, submit
from curkv.bench.text import documentation_text
from curkv.cache.options import EvictionOptions
from curkv.config import EngineOptions, KVDtype
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.models.loading import load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL

CHUNKS = (64, 333, 512, 4096)
KV_DTYPES: tuple[KVDtype, ...] = ("float16", "bfloat16")


def main(
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[int, typer.Option(min=2, help="Of lengths that grow from 5 tokens.")] = 32,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 4000,
    new_tokens: int = 16,
) -> None:
    """Runs the comparison and prints its outcome."""
    directory = resolve_model(model)
    ids = load_tokenizer(directory).encode(documentation_text()).ids
    ratio = (longest / 5) ** (1 / (prompts - 1))
    lengths = [round(5 * ratio**i) for i in range(prompts)]
    texts: list[list[int]] = [ids[1000 * i : 1000 * i + n] for i, n in enumerate(lengths)]

    def engine(kv_dtype: KVDtype, chunk: int) -> Engine:
        options = EngineOptions(
            model=str(directory),
            weights="float32",
            kv_cache_memory=2**31,
            prefix_cache_memory=0,
            kv_dtype=kv_dtype,
            page_size=32,
            max_step_tokens=chunk,
            max_sequences=prompts,
            max_model_len=longest + 64,
        )
        return build_engine(options)

    def generate(target: Engine, chosen: list[int]) -> dict[int, list[int]]:
        sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
        for i in chosen:
            submit(target, str(i), texts[i], sampling, EvictionOptions())
        found: dict[int, list[int]] = {i: [] for i in chosen}
        while target.has_work:
            for output in target.step():
                found[int(output.request_id)] += output.token_ids
        return found

    reference = baseline.load(directory)
    expected = [
        baseline.generate(reference, torch.tensor([text]), new_tokens)[0].tolist()
        for text in tqdm(texts, desc="transformers")
    ]
    everything = list(range(prompts))
    print(f"{prompts} prompts of {lengths[0]} to {lengths[-1]} tokens, {new_tokens} new tokens each")
    for chunk in CHUNKS:
        target = engine("float32", chunk)
        together = generate(target, everything)
        same = sum(together[i] == expected[i] for i in everything)
        alone = sum(generate(target, [i])[i] == expected[i] for i in tqdm(everything, desc=f"chunk {chunk}"))
        print(f"float32, chunks of {chunk:>4}: of {prompts}, {same} equal batched, {alone} alone")
    for dtype in KV_DTYPES:
        together = generate(engine(dtype, 512), everything)
        _report_divergence(reference, texts, expected, together, dtype)


def _report_divergence(
    model: PreTrainedModel,
    prompts: list[list[int]],
    expected: list[list[int]],
    found: dict[int, list[int]],
    kv_dtype: str,
) -> None:
    """Prints, for each prompt whose tokens differ, the first place and the reference's logit gap there."""
    different = [i for i in found if found[i] != expected[i]]
    print(f"{kv_dtype}, chunks of  512: {len(prompts) - len(different)}/{len(prompts)} equal")
    for i in different:
        pairs = zip(expected[i], found[i], strict=True)
        place = next(itertools.compress(itertools.count(), (a != b for a, b in pairs)))
        with torch.inference_mode():
            logits = model(torch.tensor([prompts[i] + expected[i][:place]])).logits[0, -1]
        gap = logits[expected[i][place]] - logits[found[i][place]]
        print(
            f"  prompt of {len(prompts[i])}: token {place}, logit gap {gap:.4f} (spread {logits.std():.1f})"
        )


app = script(__doc__, main)

if __name__ == "__main__":
    app()
