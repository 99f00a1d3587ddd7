"""What the cache gathers of queries: across chunks, forks and batches, and only for those who ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.integrity import check_integrity
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.observations import BLOCK_SKIP, STATISTICS_SKIP, Needs
from curkv.cache.page_manager import PageManager
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.rope.reference import rope
from tests.cache.util import poison
from tests.kernels.util import rope_tables

LAYERS, HEADS, GROUP, DIM, N = 2, 2, 3, 16, 70
TABLES = rope_tables(DIM, 256)
ROPE = [TABLES, TABLES]
EVERYTHING = Needs(queries=12, column_sums=True, query_statistics=True, block=16)


def make_cache(window: int | None = None) -> PageManager:
    layers = tuple(replace(layer, window=window) for layer in full_attention(LAYERS, HEADS))
    layout = CacheLayout(layers, DIM, 8, get_format("float32"), 6, 128)
    cache = PageManager(layout, 400, get_kernels("cpu"))
    poison(cache)
    return cache


def make_tokens(seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(N, heads, DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS))
        for _ in range(LAYERS)
    ]


def feed(
    cache: PageManager, slots: dict[int, tuple[int, int]], tokens: list[tuple[torch.Tensor, ...]]
) -> None:
    """Computes tokens start .. end of the same text for each slot; single tokens go first."""
    counts = [end - start for start, end in slots.values()]
    cache.extend(list(slots), counts)
    batch = Batch.build(
        list(slots),
        [[0] * count for count in counts],
        [start for start, _ in slots.values()],
        observed=cache.observed,
    )
    attention = PagedAttention(cache, ROPE)
    for layer, parts in enumerate(tokens):
        attention.attend(
            layer, *(torch.cat([part[start:end] for start, end in slots.values()]) for part in parts), batch
        )
    attention.see_steps(batch.stepped, batch.seen)


def rotated(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    rope(x, *TABLES, torch.arange(len(x), dtype=torch.int32))
    return x


def expected_sums(q: torch.Tensor, k: torch.Tensor, tokens: int) -> torch.Tensor:
    """[H, tokens], attention received from the first `tokens` queries."""
    q, k = rotated(q[:tokens]).view(tokens, HEADS, GROUP, DIM), rotated(k[:tokens])
    logits = torch.einsum("qhgd,khd->hgqk", q, k) * DIM**-0.5
    causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return logits.masked_fill(causal, -torch.inf).softmax(-1).sum((1, 2))


@pytest.mark.parametrize("chunks", [[N], [30, 1, 1, 5, 33], [1] * 9 + [61], [66, 1, 1, 1, 1]])
def test_everything_is_gathered_whatever_the_chunks(chunks):
    cache, tokens = make_cache(), make_tokens()
    slot, start = cache.add_sequence(EVERYTHING), 0
    for chunk in chunks:
        feed(cache, {slot: (start, start + chunk)}, tokens)
        start += chunk
    view = PagedAttention(cache, ROPE).view(slot)
    queries = view.queries(12).view(LAYERS, HEADS, 12, GROUP, DIM)
    for layer, (q, k, _) in enumerate(tokens):
        wanted = rotated(q)[-12:].view(12, HEADS, GROUP, DIM).transpose(0, 1)
        torch.testing.assert_close(queries[layer], wanted)
        sums = view.gather(view.pages.attention, -1.0)[layer]
        torch.testing.assert_close(sums, expected_sums(q, k, N), rtol=1e-4, atol=1e-5)
        statistics, seen = view.observations.statistics[layer], q[STATISTICS_SKIP:]
        torch.testing.assert_close(statistics.mean, seen.mean(0))
        centred = seen - seen.mean(0)
        covariance = torch.einsum("thi,thj->hij", centred, centred) / len(seen)
        torch.testing.assert_close(statistics.covariance, covariance, rtol=1e-4, atol=1e-5)
        sums = view.observations.blocks[layer].all_sums()
        assert sums.shape == (HEADS, N - BLOCK_SKIP)
        block = slice(BLOCK_SKIP + 16, BLOCK_SKIP + 32)
        inside = torch.einsum(
            "qhgd,khd->hgqk", rotated(q)[block].view(16, HEADS, GROUP, DIM), rotated(k)[block]
        )
        torch.testing.assert_close(sums[:, 16:32], inside.softmax(-1).sum(2).mean(1), rtol=1e-4, atol=1e-5)


def test_only_those_who_ask_are_observed_in_mixed_batches():
    cache, tokens = make_cache(), make_tokens()
    summed, plain = cache.add_sequence(Needs(column_sums=True)), cache.add_sequence()
    feed(cache, {plain: (0, 20), summed: (0, 30)}, tokens)
    feed(cache, {summed: (30, 31), plain: (20, 21)}, tokens)
    feed(cache, {plain: (21, 22), summed: (31, 40)}, tokens)
    for layer, (q, k, _) in enumerate(tokens):
        sums = PagedAttention(cache, ROPE).view(summed).gather(cache.pages.attention, -1.0)[layer]
        torch.testing.assert_close(sums, expected_sums(q, k, 40), rtol=1e-4, atol=1e-5)
    assert PagedAttention(cache, ROPE).view(plain).gather(cache.pages.attention, 0.0).eq(0).all()
    assert PagedAttention(cache, ROPE).view(plain).observations is None


def test_sums_of_layers_with_windows_are_those_of_chunks_while_decoding_too():
    sums = []
    for chunks in ([40], [30, *[1] * 10]):
        cache, tokens, start = make_cache(window=20), make_tokens(), 0
        slot = cache.add_sequence(Needs(column_sums=True))
        for chunk in chunks:
            feed(cache, {slot: (start, start + chunk)}, tokens)
            start += chunk
        view = PagedAttention(cache, ROPE).view(slot)
        sums.append(view.gather(view.pages.attention, -1.0))
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-5)


def test_forks_go_on_apart_and_leave_nothing_behind():
    cache, tokens = make_cache(), make_tokens()
    slot = cache.add_sequence(EVERYTHING)
    feed(cache, {slot: (0, 40)}, tokens)
    fork, blind = cache.fork(slot), cache.fork(slot, observe=False)
    feed(cache, {fork: (40, 41)}, tokens)
    feed(cache, {blind: (40, 60)}, make_tokens(1))
    check_integrity(cache)
    for layer, (q, k, _) in enumerate(tokens):
        for owner, count in ((slot, 40), (fork, 41)):
            view = PagedAttention(cache, ROPE).view(owner)
            sums = view.gather(cache.pages.attention, -1.0)[layer]
            torch.testing.assert_close(sums, expected_sums(q, k, count), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(view.observations.last_queries(12)[layer], rotated(q[:count])[-12:])
    assert PagedAttention(cache, ROPE).view(blind).observations is None
    for owner in (slot, fork, blind):
        cache.free(owner)
    assert (
        cache.used_pages == 0 and PagedAttention(cache, ROPE).view(cache.add_sequence()).observations is None
    )
