"""Explanations keep what evictions keep, cost nothing after, and their error is that of the attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from curkv.cache.eviction import select
from curkv.cache.explain import output_errors
from curkv.cache.observations import Needs, Observations
from curkv.cache.parsing import parse_options
from curkv.engine.engine import Engine

from .conftest import Loaded, request, run

MakeEngine = Callable[..., Engine]

POLICIES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"policy": "curdkv", "budget": "50%"},
    {"policy": "adacurdkv", "budget": "25%"},
    {"policy": "snapkv", "budget": "25%"},
    {"policy": "h2o", "budget": "30tok"},
    {"policy": "streaming-llm", "budget": "30tok", "recent_tokens": 20},
]


def test_explained_is_what_would_be_kept(
    make_engine: MakeEngine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, engine = loaded.prompt(120), make_engine(page_size=16, max_step_tokens=50)
    options = tuple(parse_options(policy) for policy in POLICIES)
    asked = replace(request(prompt, 0), explain=options)
    [[output]] = run(engine, asked).values()
    assert output.finish_reason == "length" and len(output.explanations) == len(POLICIES)

    kept: list[np.ndarray] = []

    def spy(*args: Any) -> Any:
        indices, counts = select(*args)
        mask = np.zeros((*counts.shape, len(prompt)), dtype=bool)
        for place in np.ndindex(*counts.shape):
            mask[place][indices[place][: counts[place]]] = True
        kept.append(mask)
        return indices, counts

    monkeypatch.setattr("curkv.engine.evictions.select", spy)
    for kv, found in zip(options, output.explanations, strict=True):
        [[*_, last]] = run(engine, request(prompt, 1, kv=kv)).values()
        assert found.policy == kv.policy and found.budget_tokens == last.kv.budget_tokens
        if kv.policy == "full":
            assert found.kept.all() and found.bytes_kept == found.bytes_full and not found.errors.any()
            continue
        assert (found.kept == kept.pop()).all()
        assert found.bytes_full == last.kv.peak_bytes and found.bytes_kept == last.kv.bytes
        assert (0 < found.errors.mean() < 1.5) and np.isfinite(found.errors).all()
        assert (found.ranks[found.kept].mean() > found.ranks[~found.kept].mean()) and found.ranks.max() == 255


def test_others_generate_between_two_policies(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine, options = make_engine(), tuple(parse_options(policy) for policy in POLICIES)
    running = request(loaded.prompt(40), 50)
    engine.add(engine.plan(running))
    asked = replace(request(loaded.prompt(60), 0), id="asked", explain=options)
    engine.add(engine.plan(asked))
    tokens: list[int] = []
    ended = False
    while not ended:
        news = engine.step()
        tokens.append(sum(output.request_id == running.id for output in news))
        ended = any(output.request_id == asked.id for output in news)
    assert tokens == [1] * (1 + len(options)), "of the running request, in each step that asks a policy"


def test_an_abandoned_explanation_leaves_nothing(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine, options = make_engine(), tuple(parse_options(policy) for policy in POLICIES)
    asked = replace(request(loaded.prompt(60), 0), explain=options)
    engine.add(engine.plan(asked))
    for _ in range(3):
        assert not engine.step()
    engine.abort(asked.id)
    assert not engine.has_work and engine.kv.used_pages == 0
    engine.check_integrity()


def test_output_errors_are_those_of_attention_over_the_kept_tokens(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    engine, n, w = make_engine(page_size=16), 40, 5
    kv = engine.kv
    slot = kv.add_sequence(Needs(queries=w))
    layers, heads, dim = kv.layout.num_layers, kv.layout.num_kv_heads, kv.layout.head_dim
    group = loaded.model.config.num_heads // heads
    torch.manual_seed(0)
    kv.extend([slot], [n])
    view = engine.runner.attention.view(slot)
    k, v = torch.randn(2, layers, heads, n, dim)
    for layer in range(layers):
        for head in range(heads):
            pages = view.table[layer, head, : -(-n // 16)].long().repeat_interleave(16)[:n]
            place = (pages, torch.arange(n) % 16)
            view.pages.k.write(k[layer, head], *place)
            view.pages.v.write(v[layer, head], *place)
            view.pages.position[place] = torch.arange(n, dtype=torch.int32)
    observations = Observations(Needs(queries=w))
    q = torch.randn(layers, w, heads * group, dim)
    observations.queries = dict(enumerate(q))
    kept = torch.rand(layers, heads, n) < 0.5
    kept[..., 0] = True
    found = output_errors(replace(view, observations=observations), kept)
    causal = torch.arange(n) <= torch.arange(n - w, n)[:, None]
    for layer, head in ((0, 0), (3, 2), (layers - 1, 1)):
        queries = q[layer].view(w, heads, group, dim)[:, head].transpose(0, 1)
        whole, part = (
            torch.nn.functional.scaled_dot_product_attention(
                queries, k[layer, head].expand(group, -1, -1), v[layer, head].expand(group, -1, -1), mask
            )
            for mask in (causal, causal & kept[layer, head])
        )
        expected = (whole - part).norm() / whole.norm()
        assert float(found[layer, head]) == pytest.approx(float(expected), rel=1e-4)
    kv.free(slot)
