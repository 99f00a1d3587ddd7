"""A small cache, and plain ways to look into it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import CacheLayout, LayerSpec, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.view import CacheView
from curkv.kernels.compact.reference import compact
from curkv.kernels.formats import get_format
from curkv.kernels.formats.base import KVFormat
from curkv.kernels.paged_decode_attention.reference import paged_decode_attention
from curkv.kernels.paged_prefill_attention.reference import paged_prefill_attention
from curkv.kernels.pages import SIDES
from curkv.kernels.rope.reference import rope
from curkv.kernels.store_kv.reference import store_kv

KERNELS = SimpleNamespace(
    rope=rope,
    store_kv=store_kv,
    paged_decode_attention=paged_decode_attention,
    paged_prefill_attention=paged_prefill_attention,
    compact=compact,
)


def make_cache(
    num_pages: int = 64,
    kv_dtype: str | KVFormat = "float32",
    max_prefix_pages: int = 0,
    num_kv_heads: int = 2,
    layers: tuple[LayerSpec, ...] | None = None,
    **layout: int,
) -> PageManager:
    """A cache of 2 layers x 2 heads x 4 channels with pages of 4 tokens."""
    shape = {
        "head_dim": 4,
        "page_size": 4,
        "max_sequences": 4,
        "max_tokens": 24,
    }
    format = get_format(kv_dtype) if isinstance(kv_dtype, str) else kv_dtype
    layers = layers or full_attention(2, num_kv_heads)
    cache_layout = CacheLayout(layers, format=format, **(shape | layout))
    cache = PageManager(cache_layout, num_pages, KERNELS, max_prefix_pages=max_prefix_pages)
    poison(cache)
    return cache


def attention_over(cache: PageManager, rope: tuple[Tensor, Tensor] | None = None) -> PagedAttention:
    """Attention over a cache whose layers rotate alike; by default RoPE turns nothing."""
    half = cache.layout.head_dim // 2
    tables = rope or (torch.ones(256, half), torch.zeros(256, half))
    return PagedAttention(cache, [tables] * len(cache.layout.layers))


def view_of(cache: PageManager, slot: int, **more: Any) -> CacheView:
    """What a policy sees of a sequence."""
    return attention_over(cache).view(slot, **more)


def token_slots(cache: PageManager) -> tuple[Tensor, ...]:
    """Sequence, layer, head, page and place in the page [n] of every stored token, in this order."""
    size = cache.layout.page_size
    index = torch.arange(cache.layout.max_pages * size)
    *head, token = (index < cache.lengths[..., None]).nonzero(as_tuple=True)
    return (*head, cache.page_table[(*head, token // size)].long(), token % size)


def poison(cache: PageManager) -> None:
    """Fills all memory that holds no token, so that reading it cannot go unnoticed."""
    unused = torch.ones(cache.num_pages, cache.layout.page_size, dtype=torch.bool)
    *_, page, place = token_slots(cache)
    unused[page, place] = False
    for prefix in cache.prefixes.all:
        held, size = torch.from_numpy(prefix.table).long(), cache.layout.page_size
        index = torch.arange(held.shape[-1] * size)
        *head, token = (index < torch.from_numpy(prefix.lengths)[..., None]).nonzero(as_tuple=True)
        unused[held[(*head, token // size)], token % size] = False
    for memory in cache.pages.arrays.values():
        memory[unused.nonzero(as_tuple=True)] = torch.nan if memory.dtype.is_floating_point else -1


def head_tokens(cache: PageManager, slot: int, layer: int, head: int) -> dict[str, Tensor]:
    """All that the pages hold about one head's tokens, by field name; keys and values decoded."""
    length = int(cache.lengths[slot, layer, head])
    count = -(-length // cache.layout.page_size)
    ids = cache.page_table[slot, layer, head, :count].long()
    pages = cache.pages
    tokens = {"k": pages.k.read(ids), "v": pages.v.read(ids)} | {
        name: getattr(pages, name)[ids] for name in SIDES
    }
    return {name: x.flatten(0, 1)[:length] for name, x in tokens.items()}


def kept(masks: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Turns [L][H] lists of kept indices into what `evict` takes."""
    width = max(len(row) for layer in masks for row in layer)
    indices = [[row + [-1] * (width - len(row)) for row in layer] for layer in masks]
    counts = [[len(row) for row in layer] for layer in masks]
    shape = (len(masks), len(masks[0]), width)
    return (
        torch.tensor(indices, dtype=torch.int32).reshape(shape),
        torch.tensor(counts, dtype=torch.int32),
    )


def step(
    cache: PageManager,
    chunks: dict[int, int],
    starts: dict[int, int],
    generator: torch.Generator | None = None,
) -> Batch:
    """Adds `chunks[slot]` random tokens to each sequence through `extend` and `attend`."""
    batch = Batch.build(list(chunks), [[0] * n for n in chunks.values()], [starts[slot] for slot in chunks])
    cache.extend(list(chunks), list(chunks.values()))
    layout, total, attention = cache.layout, len(batch.token_ids), attention_over(cache)
    for layer in range(layout.num_layers):
        q, k, v = (
            torch.randn(total, heads, layout.head_dim, generator=generator)
            for heads in (2 * layout.num_kv_heads, layout.num_kv_heads, layout.num_kv_heads)
        )
        attention.attend(layer, q, k, v, batch)
    return batch


def books(cache: PageManager) -> list[Tensor]:
    """A copy of everything that a refused operation must leave as it was."""
    memory = [array.nan_to_num(-7) for array in cache.pages.arrays.values()]
    free = torch.from_numpy(cache.pool.free_pages.copy())
    owners, counts = torch.from_numpy(cache.pool.owners.copy()), torch.from_numpy(cache.page_counts.copy())
    slots = torch.tensor(cache.active_slots)
    return [*memory, cache.page_table.clone(), cache.lengths.clone(), counts, owners, free, slots]


def same_books(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
