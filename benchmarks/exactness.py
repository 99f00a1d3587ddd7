"""Greedy tokens against transformers in float32: with the full cache they have to be the same.

    python benchmarks/exactness.py [--prompts 32] [--new-tokens 16]

Runs every prompt alone and all of them batched together, at several chunk sizes, with a float32 cache. Then,
with 16-bit caches, reports where the first token differs and how close the logits were there.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from curkv.bench.text import documentation_text
from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions
from curkv.cache.page_manager import PageManager
from curkv.engine.engine import Engine
from curkv.engine.runner import Runner
from curkv.engine.types import Request, SamplingParams
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables

CHUNKS = (64, 333, 512, 4096)


def main() -> None:
    """Runs the comparison and prints its outcome."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=4000)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    directory = resolve_model(args.model)
    config, kernels, tokenizer = load_config(directory), get_kernels(), load_tokenizer(directory)
    model = Decoder(config, Checkpoint(directory, config), kernels)
    ids = tokenizer.encode(documentation_text()).ids
    ratio = (args.longest / 5) ** (1 / (args.prompts - 1))
    lengths = [round(5 * ratio**i) for i in range(args.prompts)]
    prompts = [ids[1000 * i : 1000 * i + n] for i, n in enumerate(lengths)]

    def engine(kv_dtype: str, chunk: int) -> Engine:
        layout = CacheLayout(
            full_attention(config.num_layers, config.num_kv_heads),
            config.head_dim,
            32,
            get_format(kv_dtype),
            args.prompts,
            args.longest + 64,
        )
        pages = sum(layout.sequence_pages(n + args.new_tokens) for n in lengths)
        attention = PagedAttention(
            PageManager(layout, pages, kernels), rope_tables(config, layout.max_tokens)
        )
        return Engine(Runner(model, attention), ModelInfo(tokenizer), chunk, layout.max_tokens)

    def generate(target: Engine, chosen: list[int]) -> dict[int, list[int]]:
        sampling = SamplingParams(args.new_tokens, temperature=0.0, ignore_eos=True)
        for i in chosen:
            request = Request(str(i), prompts[i], sampling, EvictionOptions())
            target.add(target.plan(request))
        found: dict[int, list[int]] = {i: [] for i in chosen}
        while target.has_work:
            for output in target.step():
                found[int(output.request_id)] += output.token_ids
        return found

    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = [_transformers(reference, p, args.new_tokens) for p in tqdm(prompts, desc="transformers")]
    everything = list(range(len(prompts)))
    print(
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {args.new_tokens} new tokens each"
    )
    for chunk in CHUNKS:
        target = engine("float32", chunk)
        together = generate(target, everything)
        same = sum(together[i] == expected[i] for i in everything)
        alone = sum(generate(target, [i])[i] == expected[i] for i in tqdm(everything, desc=f"chunk {chunk}"))
        print(f"float32, chunks of {chunk:>4}: of {len(prompts)}, {same} equal batched, {alone} alone")
    for kv_dtype in ("float16", "bfloat16"):
        together = generate(engine(kv_dtype, 512), everything)
        _report_divergence(reference, prompts, expected, together, kv_dtype)


def _transformers(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


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


if __name__ == "__main__":
    main()
