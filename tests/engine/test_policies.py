"""Policies, context boundaries and streaming prefill through the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from curkv.cache.declarations import options_of
from curkv.cache.parsing import parse_options
from curkv.cache.policies import get_policy, policy_names
from curkv.engine.engine import Engine
from curkv.engine.types import InvalidRequest, KVReport

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
POLICIES = sorted(
    set(policy_names()) - {"full", "curdkv", "adacurdkv", "streaming-llm", "knorm", "random", "kvzip"}
)


def report_of(engine: Engine, item: Any) -> KVReport:
    report = run(engine, item)[item.id, 0][-1].kv
    assert report is not None
    return report


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets_are_met_in_prefill_and_decode_whatever_the_chunks(
    make_engine: MakeEngine, loaded: Loaded, policy: str
) -> None:
    raw = {"policy": policy, "budget": 40, "decode_budget": 44, "decode_interval": 5, "recent_tokens": 16}
    raw |= {"observation": 16} if "observation" in options_of(type(get_policy(policy))) else {}
    found = []
    for max_step_tokens in (128, 50):
        engine = make_engine(max_step_tokens=max_step_tokens)
        item = request(loaded.prompt(100), 8, kv=parse_options(raw))
        outputs = run(engine, item)["r", 0]
        report = outputs[-1].kv
        assert report is not None
        assert (report.kept_tokens, report.decode_evictions) == (40, 1)
        assert report.evicted_tokens == 60 + 1
        found.append(tokens(outputs))
    if "compactor" not in policy:  # random projections are the same, rounding of blocks is not
        assert found[0] == found[1]


@pytest.mark.parametrize("policy", ["snapcur", "curdkv", "h2o"])
def test_a_context_is_compressed_before_the_question_is_seen(
    make_engine: MakeEngine, loaded: Loaded, policy: str
) -> None:
    raw = {"policy": policy, "budget": "25%", "context_tokens": 160}
    kept = []
    for start, max_step_tokens in ((0, 512), (1000, 512), (1000, 50)):
        engine = make_engine(max_step_tokens=max_step_tokens)
        item = request(loaded.prompt(160) + loaded.prompt(20, start=start), 1, kv=parse_options(raw))
        engine.add(engine.plan(item))
        while engine.last_stats.evictions == []:
            engine.step()
        view = engine.runner.attention.view(0)
        kept.append(view.position.tolist())
        assert engine.kv.sequence_tokens(0) == 40 * engine.kv.layout.num_heads
        report = run(engine)["r", 0][-1].kv
        assert report is not None and (report.kept_tokens, report.budget_tokens) == (60, 60)
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("policy", ["snapkv", "adacurdkv", "streaming-llm", "h2o"])
def test_streaming_prefill_holds_no_more_than_budget_and_chunk(
    make_engine: MakeEngine, loaded: Loaded, policy: str
) -> None:
    raw = {"policy": policy, "budget": 96, "prefill": "streaming", "prefill_chunk": 64}
    item = request(loaded.prompt(400), 4, kv=parse_options(raw))
    found = []
    for max_step_tokens in (512, 40):
        engine = make_engine(num_pages=90 * 8, max_step_tokens=max_step_tokens)
        outputs = run(engine, item)["r", 0]
        report = outputs[-1].kv
        assert report is not None and report.kept_tokens == 96
        ragged = 90 if policy == "adacurdkv" else 0
        assert report.peak_bytes <= (90 * 5 + ragged) * engine.kv.page_bytes
        assert report.evicted_tokens == 400 - 96
        found.append(tokens(outputs))
    assert found[0] == found[1]
    with pytest.raises(InvalidRequest):
        engine.plan(
            request(
                loaded.prompt(400), 4, kv=parse_options(raw | {"prefill": "exact"} | {"prefill_chunk": None})
            )
        )


def test_streaming_requests_run_together(make_engine: MakeEngine, loaded: Loaded) -> None:
    raw = {"policy": "snapcur", "budget": 96, "prefill": "streaming", "prefill_chunk": 64}
    items = [
        request(loaded.prompt(300, start=100 * i), 4, id=str(i), kv=parse_options(raw)) for i in range(6)
    ]
    engine = make_engine(num_pages=90 * 20, max_step_tokens=128)
    together = run(engine, *items)
    for item in items[:2]:
        assert tokens(run(engine, item)[item.id, 0]) == tokens(together[item.id, 0])


@pytest.mark.parametrize("merge", ["nearest"])
def test_merging_changes_what_is_kept_but_not_how_much(
    make_engine: MakeEngine, loaded: Loaded, merge: str
) -> None:
    engine = make_engine()
    raw = {"policy": "snapkv", "budget": "25%"}
    plain = request(loaded.prompt(300), 6, n=2, kv=parse_options(raw))
    other = request(
        loaded.prompt(300), 6, n=2, kv=parse_options(raw | {"merge": merge, "merge_threshold": 0.1})
    )
    assert report_of(engine, plain).kept_tokens == report_of(engine, other).kept_tokens == 75


def test_forks_and_preemption_keep_their_observations(make_engine: MakeEngine, loaded: Loaded) -> None:
    raw = {"policy": "snapkv", "budget": 80, "decode_budget": 100, "decode_interval": 16}
    items = [
        request(loaded.prompt(128, start=200 * i), 24, id=str(i), n=2, kv=parse_options(raw), seed=i)
        for i in range(3)
    ]
    roomy, tight = run(make_engine(), *items), run(make_engine(num_pages=90 * 11), *items)
    for key, outputs in roomy.items():
        assert tokens(outputs) == tokens(tight[key])


@pytest.mark.parametrize("policy", ["compactor", "expected-attention", "snapcur"])
def test_a_very_short_prompt_disturbs_nobody(make_engine: MakeEngine, loaded: Loaded, policy: str) -> None:
    """Shorter than the tokens that statistics of queries leave out."""
    engine = make_engine()
    other = request(loaded.prompt(40), 8, id="other")
    alone = tokens(run(engine, other)["other", 0])
    short = request(loaded.prompt(2), 1, id="short", kv=parse_options({"policy": policy, "budget": "50%"}))
    outputs = run(engine, other, short)
    assert tokens(outputs["other", 0]) == alone
    report = outputs["short", 0][-1].kv
    assert report is not None and report.kept_tokens == 1


@pytest.mark.parametrize(
    ("more", "picked"),
    [
        ({}, "snapcur"),
        ({"decode_budget": 120}, "snapcur"),
        ({"context_tokens": 60}, "kvzip"),
        ({"context_tokens": 90}, "adacompactor"),  # twice that is too long for the model
        ({"context_tokens": 60, "prefill": "streaming"}, "adacompactor"),
    ],
)
def test_auto_picks_by_the_form_of_the_request_and_says_what(
    make_engine: MakeEngine, loaded: Loaded, more: dict[str, int | str], picked: str
) -> None:
    kv = parse_options({"policy": "auto", "budget": "50%", **more})
    report = report_of(make_engine(max_model_len=200), request(loaded.prompt(100), 2, kv=kv))
    assert report.policy == picked


@pytest.mark.parametrize(
    ("length", "more", "expected"),
    [
        (100, {}, "kvzip"),
        (250, {}, "kvzip"),  # a state goes on to the end of the context
        (100, {"context_tokens": 50}, "kvzip"),
        (100, {"prefill": "streaming"}, "adacompactor"),
        (100, {"decode_budget": "96"}, "snapcur"),
    ],
)
def test_auto_in_a_session_reads_no_question(
    length: int, more: dict[str, object], expected: str, make_engine: MakeEngine, loaded: Loaded
) -> None:
    kv = parse_options({"policy": "auto", "budget": "50%", **more})
    item = replace(request(loaded.prompt(length), 2, kv=kv), session="chat")
    assert make_engine(max_model_len=256).plan(item).eviction.policy.name == expected
