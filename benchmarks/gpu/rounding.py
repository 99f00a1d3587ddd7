"""What the 8-bit formats of GPUs cost in quality, worked out in plain torch: needs none.

    python benchmarks/gpu/rounding.py

Prints, for a text that the model reads at once, the perplexity as a multiple of float32's, the mean KL
divergence from it, and how often the likeliest next token is the same. Products are those of rows rounded as
`--weights fp8` and `int8` round them on a GPU; all else stays float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from curkv.bench.script import Model, script
from curkv.bench.text import documentation_text
from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.engine.runner import Runner
from curkv.kernels.dispatch import Kernels, get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear import reference
from curkv.kernels.linear.formats import FLOAT32, FP8, GPU_INT8, WeightFormat
from curkv.kernels.linear.reference import ReferenceLinear
from curkv.kernels.linear.spec import Packed
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables
from curkv.tables import head, line

PAGE = 64


@dataclass(frozen=True, eq=False)
class RoundingLinear(ReferenceLinear):
    """A layer whose rows of x are rounded like those of its weight."""

    form: WeightFormat = FLOAT32

    def __call__(self, x: Tensor) -> Tensor:
        rows, scales = self.form.encode(x)
        return super().__call__(x if scales is None else rows.float() * scales[:, None])


def rounding_kernels() -> Kernels:
    """The reference kernels, whose linear layers round what goes into them."""

    def pack_linear(
        weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = FLOAT32
    ) -> ReferenceLinear:
        made = reference.pack_linear(weight, bias, form)
        return RoundingLinear(made.weight, made.bias, made.scales, made.given, form=form)

    return replace(get_kernels("reference"), pack_linear=pack_linear)


def log_probabilities(directory: Path, ids: list[int], form: WeightFormat, kv_dtype: str) -> Tensor:
    """Of every next token, float32 [tokens, vocab]."""
    config, kernels = load_config(directory), rounding_kernels()
    model = Decoder(config, Checkpoint(directory, config), kernels, form)
    layers = full_attention(config.num_layers, config.num_kv_heads)
    layout = CacheLayout(layers, config.head_dim, PAGE, get_format(kv_dtype), 1, len(ids))
    kv = PageManager(layout, layout.sequence_pages(len(ids)), kernels)
    runner = Runner(model, PagedAttention(kv, rope_tables(config, len(ids))))
    return runner.run([kv.add_sequence()], [ids], [0], [len(ids)]).log_softmax(-1)


def rows(directory: Path, tokens: int) -> Iterator[list[str]]:
    """A row for each format."""
    ids = load_tokenizer(directory).encode(documentation_text()[: 20 * tokens]).ids[:tokens]
    following = torch.tensor(ids[1:])[:, None]
    exact = log_probabilities(directory, ids, FLOAT32, "float32")
    for name, form, kv_dtype in (
        ("bfloat16 cache", FLOAT32, "bfloat16"),
        ("int8 cache", FLOAT32, "int8"),
        ("fp8 cache", FLOAT32, "fp8"),
        ("int8 products", GPU_INT8, "float32"),
        ("fp8 products", FP8, "float32"),
        ("fp8 products and cache", FP8, "fp8"),
    ):
        found = log_probabilities(directory, ids, form, kv_dtype)
        loss = (exact[:-1].gather(1, following) - found[:-1].gather(1, following)).mean()
        kl = (exact.exp() * (exact - found)).sum(-1).mean()
        same = (exact.argmax(-1) == found.argmax(-1)).float().mean()
        yield [name, f"{float(loss.exp()):.4f}", f"{float(kl):.4f}", f"{float(same):.1%}"]


def main(
    model: Model = DEFAULT_MODEL, tokens: Annotated[int, typer.Option(help="Of the text.")] = 1000
) -> None:
    """Prints the table."""
    print(head(["format", "perplexity", "KL", "same token"]))
    for cells in rows(resolve_model(model), tokens):
        print(line(cells), flush=True)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
