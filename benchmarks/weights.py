"""What `--weights` costs: perplexity and KL beside float32 weights, and memory.

    python benchmarks/weights.py [--windows 8] [--length 512]

Windows of text go through the server's own engine as prompts, over a float32 cache. With rounded weights, on
a machine that multiplies in bfloat16, attention is rounded too.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from tqdm import tqdm

from curkv.bench.script import Model, prompt_logits, script
from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import compare, token_windows
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

KINDS: tuple[Weights, ...] = ("published", "int8", "int4")


@torch.inference_mode()
def main(
    model: Model = DEFAULT_MODEL,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Repeatable. [documentation, mansfield-park]")
    ] = None,
    windows: int = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
) -> None:
    """Compares every type with float32 and prints a table."""

    def engine(weights: Weights) -> Engine:
        options = EngineOptions(
            model=model,
            weights=weights,
            kv_cache_memory=2**30,
            prefix_cache_memory=0,
            kv_dtype="float32",
            max_model_len=length,
        )
        return build_engine(options)

    exact = engine("float32")
    print(head(["weights", "MiB", "text", "perplexity / float32", "KL", "same top token"]))
    for kind in KINDS:
        rounded = engine(kind)
        mebibytes = sum(rounded.runner.model.weights_bytes.values()) / 2**20
        for name in corpus or ["documentation", "mansfield-park"]:
            texts = token_windows(exact.info.tokenizer, load_corpus(name), length, windows)
            found = compare(prompt_logits(exact), prompt_logits(rounded), tqdm(texts, disable=None))
            quality = f"{found.ratio:.4f}", f"{found.kl:.4f}", f"{found.top1:.1%}"
            named = f"{kind} ({rounded.runner.model.weights})" if kind == "published" else kind
            print(line([named, f"{mebibytes:.0f}", name, *quality]), flush=True)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
