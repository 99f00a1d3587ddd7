"""Prefixes: what a prompt shares with earlier ones is not computed again, and changes nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.engine.engine import Engine
from curkv.engine.runner import Runner
from curkv.engine.types import Output, Request
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables

from .conftest import request, run, tokens
from .small_model import CONFIG as SMALL
from .small_model import random_checkpoint

Kept = list[torch.Tensor]
CONFIG = replace(SMALL, max_positions=1024)
PAGE, HEADS, PLENTY = 32, CONFIG.num_layers * CONFIG.num_kv_heads, 10_000


@functools.cache
def model() -> Decoder:
    return Decoder(CONFIG, random_checkpoint(), get_kernels("cpu"))


def make_engine(
    num_pages: int = 2000,
    max_prefix_pages: int = 0,
    max_step_tokens: int = 512,
    kv_dtype: str = "float16",
    window: int | None = None,
) -> Engine:
    """An engine over the small model, whose first layer may have a window."""
    first, *others = full_attention(CONFIG.num_layers, CONFIG.num_kv_heads)
    layout = CacheLayout(
        (replace(first, window=window), *others),
        CONFIG.head_dim,
        PAGE,
        get_format(kv_dtype),
        8,
        CONFIG.max_positions,
    )
    kv = PageManager(layout, num_pages, get_kernels("cpu"), max_prefix_pages=max_prefix_pages)
    runner = Runner(model(), PagedAttention(kv, rope_tables(CONFIG, CONFIG.max_positions)))
    words = Tokenizer(WordLevel({str(i): i for i in range(CONFIG.vocab_size)}, unk_token="0"))
    return Engine(runner, ModelInfo(words), max_step_tokens, CONFIG.max_positions)


def prompt(length: int, text: int = 0) -> list[int]:
    """The beginning of one of many random texts."""
    generator = torch.Generator().manual_seed(text)
    return torch.randint(CONFIG.vocab_size, (1000,), generator=generator)[:length].tolist()


PLAIN = {
    "full": {},
    "curdkv": {"policy": "curdkv", "budget": "25%"},
    "adacurdkv": {"policy": "adacurdkv", "budget": "25%", "decode_budget": "100"},
    "snapkv": {"policy": "snapkv", "budget": "25%"},
    "snapcur": {"policy": "snapcur", "budget": "25%", "decode_budget": "100", "decode_interval": "5"},
    "streaming": {"policy": "curdkv", "budget": "60", "prefill": "streaming", "prefill_chunk": "100"},
    "random": {"policy": "random", "budget": "25%", "seed": "1"},
}
ALL_QUERIES = {name: {"policy": name, "budget": "25%"} for name in ("h2o", "expected-attention", "compactor")}
CONTEXT = {
    "curdkv": {"policy": "curdkv", "budget": "25%"},
    "compactor": {"policy": "compactor", "budget": "25%"},
    "adacurdkv": {"policy": "adacurdkv", "budget": "25%", "decode_budget": "80", "decode_interval": "4"},
    "merged": {"policy": "knorm", "budget": "25%", "merge": "nearest"},
    "streaming": {"policy": "random", "budget": "60", "prefill": "streaming", "prefill_chunk": "100"},
}


def stored(engine: Engine, slot: int) -> Kept:
    """All that a sequence holds: positions, side arrays, keys and values."""
    view, pages = engine.runner.attention.view(slot), engine.kv.pages
    sides = [view.gather(getattr(pages, name), -1).clone() for name in ("position", "k_sq", "v_sq")]
    vectors = [read(layer) for read in (view.keys, view.values) for layer in range(view.num_layers)]
    return [*sides, *vectors]


def watched(engine: Engine, *requests: Request) -> dict[str, tuple[list[int], Kept, list[Output]]]:
    """Runs requests and looks, after each one's first token, at what its cache holds."""
    for item in requests:
        engine.add(engine.plan(item))
    outputs: dict[str, list[Output]] = {}
    kept: dict[str, Kept] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        for sequence in engine.scheduler.running:
            if len(sequence.output) == 1 and sequence.request.id not in kept:
                kept[sequence.request.id] = stored(engine, sequence.slot)
        engine.check_integrity()
    assert engine.kv.used_pages == 0
    return {id: (tokens(news), kept[id], news) for id, news in outputs.items()}


def same(a: tuple[list[int], Kept, Any], b: tuple[list[int], Kept, Any]) -> bool:
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


def questions(count: int, context: int = 300, **kv: str) -> list[Request]:
    """The same context with different questions behind it."""
    options = parse_options(kv)
    return [
        request(prompt(context) + prompt(20 + 7 * i, text=1 + i), 12, f"q{i}", options) for i in range(count)
    ]


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "k8v4"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_shared_prompt_is_computed_once_and_answers_are_the_same(name: str, kv_dtype: str) -> None:
    items = questions(3, **PLAIN[name])
    engine = make_engine(max_prefix_pages=PLENTY, kv_dtype=kv_dtype)
    shared = 96 if name == "streaming" else 300
    for i, item in enumerate(items):
        [found] = watched(engine, item).values()
        [expected] = watched(make_engine(kv_dtype=kv_dtype), item).values()
        assert same(found, expected)
        assert found[2][-1].cached_tokens == (shared if i else 0)
    [again] = watched(engine, items[2]).values()
    assert same(again, expected)


@pytest.mark.parametrize("name", ALL_QUERIES)
def test_policies_that_need_every_query_compute_every_token(name: str) -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    [plain] = questions(1)
    run(engine, plain)
    [item] = questions(1, **ALL_QUERIES[name])
    [found] = watched(engine, item).values()
    [expected] = watched(make_engine(), item).values()
    assert same(found, expected)
    assert found[2][-1].cached_tokens == 0


def test_requests_that_arrive_together_share_what_the_first_one_computes() -> None:
    engine = make_engine(max_prefix_pages=PLENTY, max_step_tokens=64)
    items = questions(4)
    together = watched(engine, *items)
    computed = 0
    for item in items:
        [alone] = watched(make_engine(), item).values()
        assert same(together[item.id], alone)
        computed += len(item.prompt_token_ids) - together[item.id][2][-1].cached_tokens
    assert computed < 2 * 330


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "k8v4"])
@pytest.mark.parametrize("name", CONTEXT)
def test_a_compressed_context_is_used_again(name: str, kv_dtype: str) -> None:
    items = questions(3, context_tokens="300", **CONTEXT[name])
    engine = make_engine(max_prefix_pages=PLENTY, kv_dtype=kv_dtype)
    for i, item in enumerate(items):
        [found] = watched(engine, item).values()
        [expected] = watched(make_engine(kv_dtype=kv_dtype), item).values()
        assert same(found, expected)
        assert found[2][-1].cached_tokens == (300 if i else 0)
        kv, usual = found[2][-1].kv, expected[2][-1].kv
        assert kv is not None and usual is not None
        assert (kv.kept_tokens, kv.evicted_tokens) == (usual.kept_tokens, usual.evicted_tokens)
        assert (kv.decode_evictions, kv.bytes) == (usual.decode_evictions, usual.bytes)
    assert engine.kv.usage.prefix_bytes <= 0.45 * 300 * engine.kv.layout.token_bytes


def test_a_compressed_context_is_computed_by_one_and_waited_for_by_the_others() -> None:
    engine = make_engine(max_prefix_pages=PLENTY, max_step_tokens=64)
    items = questions(4, context_tokens="300", **CONTEXT["compactor"])
    other = request(prompt(40, text=9), 4, id="other")
    together = watched(engine, *items, other)
    assert [together[item.id][2][-1].cached_tokens for item in items] == [0, 300, 300, 300]
    assert together["other"][2][-1].cached_tokens == 0
    for item in items:
        [alone] = watched(make_engine(), item).values()
        assert same(together[item.id], alone)


@pytest.mark.parametrize(
    "other",
    [{"budget": "50%"}, {"policy": "knorm"}, {"seed": "3"}, {"context_tokens": "299"}, {"preset": "paper"}],
)
def test_other_options_are_another_prefix(other: dict[str, str]) -> None:
    options = {"policy": "curdkv", "budget": "25%", "context_tokens": "300"}
    engine = make_engine(max_prefix_pages=PLENTY)
    run(engine, *questions(1, **options))
    [outputs] = run(engine, *questions(1, **{**options, **other})).values()
    assert outputs[-1].cached_tokens == 0


def test_a_context_judged_by_attention_is_shared_whole_and_not_compressed() -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    items = questions(2, policy="snapkv", budget="25%", context_tokens="300")
    run(engine, items[0])
    assert engine.kv.prefixes.held_pages == 9 * HEADS
    [found] = watched(engine, items[1]).values()
    [expected] = watched(make_engine(), items[1]).values()
    assert found[2][-1].cached_tokens == 300 - engine.plan(items[1]).eviction.observed.queries
    assert same(found, expected)


@pytest.mark.parametrize(("kv", "least"), [({}, 9), ({"policy": "adacurdkv", "budget": "50%"}, 0)])
def test_prefixes_give_way_before_anything_is_preempted(kv: dict[str, str], least: int) -> None:
    """Even those of the sequence itself, if an eviction finds no room for a copy of what it keeps."""
    engine = make_engine(num_pages=HEADS * 12, max_prefix_pages=PLENTY)
    for i in range(6):
        item = request(prompt(300, text=i), 4, id=str(i), kv=parse_options(kv))
        [found] = watched(engine, item).values()
        [expected] = watched(make_engine(), item).values()
        assert same(found, expected)
        assert engine.last_stats.preemptions == 0
    assert HEADS * least <= engine.kv.prefixes.held_pages <= HEADS * 12


@pytest.mark.parametrize(
    "kv",
    [
        {},
        {"policy": "adacurdkv", "budget": "50%"},
        {"policy": "curdkv", "budget": "25%", "context_tokens": "100"},
        {"policy": "curdkv", "budget": "80", "decode_budget": "100"},
    ],
)
def test_a_tight_pool_gives_the_same_answers(kv: dict[str, str]) -> None:
    items = questions(5, context=160, **kv)
    tight = make_engine(num_pages=HEADS * 11, max_prefix_pages=PLENTY)
    found = watched(tight, *items)
    for item in items:
        [alone] = watched(make_engine(), item).values()
        assert found[item.id][0] == alone[0]
    tight.drop_prefixes()
    assert tight.kv.pool.num_free == tight.kv.num_pages


def test_an_abort_leaves_only_what_is_held_and_dropping_gives_it_back() -> None:
    engine = make_engine(max_prefix_pages=PLENTY, max_step_tokens=64)
    for steps in (0, 2, 5, 9):
        items = [
            *questions(2),
            *questions(2, policy="curdkv", budget="25%", context_tokens="300"),
        ]
        for i, item in enumerate(items):
            engine.add(engine.plan(request(item.prompt_token_ids, 20, f"{i}", item.eviction)))
        for _ in range(steps):
            engine.step()
            engine.check_integrity()
        for i in range(len(items)):
            engine.abort(f"{i}")
        engine.step()
        engine.check_integrity()
        assert engine.kv.used_pages == 0 and not engine.has_work
    held = engine.kv.usage.prefix_bytes
    assert held and engine.drop_prefixes() == held
    engine.check_integrity()
    assert engine.kv.pool.num_free == engine.kv.num_pages and not engine.kv.usage.prefix_bytes


def test_the_limit_bounds_what_is_held() -> None:
    engine = make_engine(max_prefix_pages=HEADS * 5)
    for i in range(3):
        run(engine, request(prompt(300, text=i), 2))
        assert engine.kv.prefixes.held_pages == HEADS * 5
    [outputs] = run(engine, request(prompt(300, text=2), 2)).values()
    assert outputs[-1].cached_tokens == 5 * 32


def test_without_a_limit_nothing_is_held() -> None:
    engine = make_engine()
    for _ in range(2):
        [outputs] = run(engine, *questions(1)).values()
        assert outputs[-1].cached_tokens == 0 and not engine.kv.usage.prefix_bytes


def test_statistics_count_tokens_looked_up_and_found() -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    for item, found, held in zip(questions(2), (0, 300), (10, 11), strict=True):
        engine.add(engine.plan(item))
        engine.step()
        stats, length = engine.last_stats, len(item.prompt_token_ids)
        assert (stats.prefix_queries, stats.prefix_hits) == (length, found)
        assert stats.prompt_tokens == length - found
        assert stats.prefix_bytes == held * HEADS * engine.kv.page_bytes
        assert stats.prefix_saved_bytes == 10 * HEADS * engine.kv.page_bytes
        run(engine)


@pytest.mark.parametrize("kv", [{}, {"policy": "curdkv", "budget": "25%", "context_tokens": "300"}])
def test_prompts_of_different_salts_share_nothing(kv: dict[str, str]) -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    [item] = questions(1, **kv)
    for salt, shares in (("a", False), ("b", False), ("", False), ("a", True)):
        [outputs] = run(engine, replace(item, cache_salt=salt)).values()
        assert (outputs[-1].cached_tokens > 0) == shares


def test_choices_of_a_prompt_share_a_prefix_too() -> None:
    item = request(prompt(300), 6, n=3, temperature=1.0, seed=3)
    engine = make_engine(max_prefix_pages=PLENTY)
    first, again, expected = run(engine, item), run(engine, item), run(make_engine(), item)
    for choice in expected:
        assert tokens(first[choice]) == tokens(again[choice]) == tokens(expected[choice])


def test_prompt_logprobs_judge_every_token() -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    run(engine, request(prompt(300), 2))
    [outputs] = run(engine, request(prompt(300), 2, prompt_logprobs=0)).values()
    assert len(outputs[0].prompt_logprobs or []) == 299 and outputs[-1].cached_tokens == 0


def test_an_eviction_that_copies_more_pages_than_it_frees_counts_none() -> None:
    engine = make_engine(max_prefix_pages=PLENTY)
    whole = request(prompt(640), max_tokens=20, id="whole")
    engine.add(engine.plan(whole))
    while not engine.step():
        pass
    part = request(
        prompt(700), max_tokens=1, id="part", kv=parse_options({"policy": "curdkv", "budget": "50%"})
    )
    engine.add(engine.plan(part))
    freed = []
    while engine.scheduler.find("part"):
        engine.step()
        freed += [eviction.pages_freed for eviction in engine.last_stats.evictions]
    assert freed == [0]
