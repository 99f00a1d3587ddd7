"""What the type of cached keys and values costs: perplexity and KL beside float32, kept sets, bytes.

    python benchmarks/kv_dtypes.py [--windows 4] [--length 1024] [--decoded 128]

Each window is a prompt in chunks of 512 and then, token by token, `--decoded` more. Kept sets are those of
`curdkv` at 25 % after the whole window.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from curkv.bench.script import Model, script
from curkv.cache.attention import PagedAttention
from curkv.cache.eviction import select
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.engine.runner import Runner
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import Logits, compare, token_windows
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config, load_tokenizer, resolve_model
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.loading.default_model import DEFAULT_MODEL
from curkv.models.rope import rope_tables

CHUNK = 512


def main(
    model: Model = DEFAULT_MODEL,
    corpus: str = "documentation",
    windows: int = 4,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    decoded: Annotated[int, typer.Option(help="Of them one by one, at the end.")] = 128,
) -> None:
    """Compares every type with float32 and prints a table."""
    directory = resolve_model(model)
    config = load_config(directory)
    network = Decoder(config, Checkpoint(directory, config), get_kernels("cpu"))
    texts = token_windows(load_tokenizer(directory), load_corpus(corpus), length, windows)
    print(f"{windows} windows of {length} tokens, the last {decoded} decoded one by one")
    print("dtype       bytes  perplexity   ratio        KL   top-1   kept as with float32")
    kept: dict[str, list[Tensor]] = {}
    exact = cached_logits(network, "float32", decoded, kept)
    for name in (name for name in KV_FORMATS if name != "float32"):
        kept.clear()
        found = compare(exact, cached_logits(network, name, decoded, kept), tqdm(texts, disable=None))
        same = [(a & b).sum() / a.sum() for a, b in zip(kept["float32"], kept[name], strict=True)]
        print(
            f"{name:<9} {layout_of(network, name).head_token_bytes:>7} {found.perplexity:>11.4f} "
            f"{found.ratio:>7.4f} {found.kl:>9.6f} {found.top1:>7.2%} {torch.stack(same).mean():>22.2%}"
        )


def layout_of(model: Decoder, kv_dtype: str) -> CacheLayout:
    """A cache for one window."""
    config = model.config
    layers = full_attention(config.num_layers, config.num_kv_heads)
    return CacheLayout(layers, config.head_dim, 64, get_format(kv_dtype), 1, config.max_positions)


def cached_logits(model: Decoder, kv_dtype: str, decoded: int, kept: dict[str, list[Tensor]]) -> Logits:
    """The model over a cache of a format; adds what `curdkv` would keep of each window, bool [L, H, n]."""
    layout, kernels = layout_of(model, kv_dtype), get_kernels("cpu")
    plan = parse_options({"policy": "curdkv", "budget": "25%"})

    def logits(ids: Tensor) -> Tensor:
        pages = layout.sequence_pages(len(ids))
        kv = PageManager(layout, pages, kernels)
        runner = Runner(model, PagedAttention(kv, rope_tables(model.config, layout.max_tokens)))
        slot, start, rows = kv.add_sequence(), 0, []
        while start < len(ids):
            end = min(start + CHUNK, len(ids) - decoded) if start < len(ids) - decoded else start + 1
            rows.append(runner.run([slot], [ids[start:end].tolist()], [start], [end - start]))
            start = end
        view = runner.attention.view(slot)
        indices, counts = select(view, resolve(plan, range(len(ids)), layout), kernels)
        chosen = torch.arange(indices.shape[-1]) < counts[..., None]
        mask = torch.zeros(*counts.shape, len(ids) + 1, dtype=torch.bool)
        mask.scatter_(-1, indices.long().where(chosen, len(ids)), True)
        kept.setdefault(kv_dtype, []).append(mask[..., :-1])
        return torch.cat(rows)

    return logits


app = script(__doc__, main)

if __name__ == "__main__":
    app()
