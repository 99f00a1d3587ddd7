"""What `--weights` costs: perplexity and KL beside float32 weights, and memory.

    python benchmarks/weights.py [--windows 8] [--length 512]

Windows of text go through the server's own engine as prompts, over a float32 cache. With rounded weights, on
a machine that multiplies in bfloat16, attention is rounded too.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import Logits, compare, token_windows

KINDS: tuple[Weights, ...] = ("int8", "int4")


def main() -> None:
    """Compares every type with float32 and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--corpus", action="append", help="default: documentation and mansfield-park")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    def engine(weights: Weights) -> Engine:
        return build_engine(
            EngineOptions(
                model=args.model,
                weights=weights,
                kv_cache_memory=1 << 30,
                kv_dtype="float32",
                prefix_cache_memory=0,
            )
        )

    exact = engine("float32")
    print("| weights | MiB | text | perplexity / float32 | KL | same top token |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        rounded = engine(kind)
        mebibytes = sum(rounded.model.weights_bytes.values()) / 2**20
        for corpus in args.corpus or ["documentation", "mansfield-park"]:
            windows = token_windows(exact.tokenizer, load_corpus(corpus), args.length, args.windows)
            found = compare(prompt_logits(exact), prompt_logits(rounded), tqdm(windows, disable=None))
            quality = f"{found.ratio:.4f} | {found.kl:.4f} | {found.top1:.1%}"
            print(f"| {kind} | {mebibytes:.0f} | {corpus} | {quality} |")


def prompt_logits(engine: Engine) -> Logits:
    """A prompt's logits, all in one chunk."""

    def logits(ids: Tensor) -> Tensor:
        slot = engine.kv.add_sequence()
        found = engine.runner.run([slot], [ids.tolist()], [0], [len(ids)])
        engine.kv.free(slot)
        return found

    return logits


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
