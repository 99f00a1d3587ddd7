"""The engine end to end on the default model: exactness, batching, eviction, forks, preemption, aborts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from curkv.bench import baseline
from curkv.cache.parsing import parse_options
from curkv.engine.engine import Engine
from curkv.engine.types import InvalidRequest, Output

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
LENGTHS = (5, 33, 64, 130, 257)


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> dict[int, list[int]]:
    """What transformers generates greedily in float32 for prompts of each length."""
    model = baseline.load(loaded.directory)
    found = {}
    for length in LENGTHS:
        ids = torch.tensor([loaded.prompt(length, start=length)])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=12,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        found[length] = output[0, length:].tolist()
    return found


def prompts(loaded: Loaded, **options: Any) -> list[Any]:
    return [request(loaded.prompt(n, start=n), 12, id=str(n), **options) for n in LENGTHS]


@pytest.mark.parametrize("max_step_tokens", [16, 100, 512])
def test_greedy_tokens_are_those_of_transformers_alone_and_batched(
    make_engine: MakeEngine, loaded: Loaded, expected: dict[int, list[int]], max_step_tokens: int
) -> None:
    engine = make_engine(max_step_tokens=max_step_tokens)
    together = run(engine, *prompts(loaded))
    for item in prompts(loaded):
        alone = run(engine, item)
        assert tokens(alone[item.id, 0]) == expected[int(item.id)]
        assert tokens(together[item.id, 0]) == expected[int(item.id)]


@pytest.mark.parametrize("policy", ["curdkv", "adacurdkv", "streaming-llm", "knorm", "random"])
def test_eviction_keeps_the_budget_and_frees_the_rest(
    make_engine: MakeEngine, loaded: Loaded, policy: str
) -> None:
    engine = make_engine()
    item = request(loaded.prompt(300), 4, kv=parse_options({"policy": policy, "budget": "25%"}))
    engine.add(engine.plan(item))
    engine.step()
    assert engine.kv.sequence_tokens(0) == 75 * 90
    assert engine.kv.used_pages <= 90 * 4 if policy == "adacurdkv" else engine.kv.used_pages == 90 * 3
    (stats,) = engine.last_stats.evictions
    assert stats.tokens_evicted == 225 * 90 and stats.pages_freed == 90 * 10 - engine.kv.used_pages
    (sequence,) = engine.last_stats.sequences
    assert (sequence.policy, sequence.held_tokens, sequence.budget_tokens) == (policy, 75, 75)
    assert (sequence.held_bytes, sequence.peak_bytes) == (
        engine.kv.usage.used_bytes,
        90 * 10 * engine.kv.page_bytes,
    )
    report = run(engine)["r", 0][-1].kv
    assert report is not None
    assert engine.last_stats.sequences == []
    assert (report.kept_tokens, report.evicted_tokens, report.kept_ratio) == (75, 225, 0.25)
    assert report.peak_bytes == 90 * 10 * engine.kv.page_bytes


def test_a_budget_of_the_whole_prompt_changes_nothing(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine = make_engine()
    full = run(engine, request(loaded.prompt(100)))["r", 0]
    kept = run(engine, request(loaded.prompt(100), kv=parse_options({"policy": "curdkv", "budget": "100%"})))[
        "r", 0
    ]
    assert tokens(full) == tokens(kept)
    assert kept[-1].kv is not None and kept[-1].kv.evicted_tokens == 0


@pytest.mark.parametrize("max_step_tokens", [37, 512])
def test_chunks_do_not_change_what_is_kept(
    make_engine: MakeEngine, loaded: Loaded, max_step_tokens: int
) -> None:
    item = request(loaded.prompt(300), 12, kv=parse_options({"policy": "adacurdkv", "budget": "20%"}))
    reference = run(make_engine(max_step_tokens=300), item)["r", 0]
    assert tokens(run(make_engine(max_step_tokens=max_step_tokens), item)["r", 0]) == tokens(reference)


def test_decode_budget_caps_what_is_held(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine = make_engine()
    options = parse_options({"policy": "curdkv", "decode_budget": "100"})
    item = request(loaded.prompt(60), 140, kv=options)
    engine.add(engine.plan(item))
    held, report = [], None
    while engine.has_work:
        outputs = engine.step()
        report = outputs[-1].kv
        held.append(engine.kv.sequence_tokens(0) / 90)
    assert report is not None and report.decode_evictions == 2
    assert max(held) < 60 + 64 + 64
    assert min(held[70:-1]) == 100


def test_choices_share_the_prompt_and_differ(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine = make_engine()
    item = request(loaded.prompt(150), 6, n=4, temperature=1.0, seed=3)
    engine.add(engine.plan(item))
    engine.step()
    engine.check_integrity()
    assert engine.kv.used_pages == 90 * (4 + 4)  # four full pages shared, one partial page each
    choices = run(engine)
    assert len({tuple(tokens(choices["r", i])) for i in range(4)}) > 1
    again = run(engine, item)
    assert [tokens(again["r", i])[1:] for i in range(4)] == [tokens(choices["r", i]) for i in range(4)]


@pytest.mark.parametrize(
    "kv",
    [
        {},
        {"policy": "adacurdkv", "budget": "50%"},
        {"policy": "curdkv", "budget": "80", "decode_budget": "100"},
    ],
)
def test_preemption_gives_the_same_answer(
    make_engine: MakeEngine, loaded: Loaded, kv: dict[str, str]
) -> None:
    options, drawn = parse_options(kv), {"temperature": 0.8, "logprobs": 1}
    items = [
        request(loaded.prompt(128, start=200 * i), 70, id=str(i), kv=options, **drawn, seed=i)
        for i in range(3)
    ]
    roomy = run(make_engine(), *items)
    engine = make_engine(num_pages=90 * 11)
    preempted = 0
    for item in items:
        engine.add(engine.plan(item))
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
        preempted += engine.last_stats.preemptions
    if not kv:
        assert preempted > 0
    for item in items:
        assert tokens(found[item.id]) == tokens(roomy[item.id, 0])
        assert logprobs(found[item.id]) == logprobs(roomy[item.id, 0])


def logprobs(outputs: list[Output]) -> list[float]:
    return [entry.logprob for output in outputs for entry in output.logprobs or ()]


def test_choices_that_cannot_copy_shared_pages_are_computed_again(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    item = request(
        loaded.prompt(128),
        80,
        n=3,
        temperature=0.8,
        seed=1,
        kv=parse_options({"policy": "curdkv", "decode_budget": "100"}),
    )
    roomy = run(make_engine(), item)
    tight = run(make_engine(num_pages=90 * (4 + 3 * 2 + 1)), item)
    for index in range(3):
        assert tokens(tight["r", index]) == tokens(roomy["r", index])


def test_abort_frees_everything_in_every_phase(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine = make_engine(max_step_tokens=64, max_sequences=2)
    for steps in (0, 1, 3, 6):
        for index in range(3):
            item = request(loaded.prompt(130), 50, id=str(index), n=2)
            engine.add(engine.plan(item))
        for _ in range(steps):
            engine.step()
        for index in range(3):
            engine.abort(str(index))
        engine.step()
        engine.check_integrity()
        assert engine.kv.used_pages == 0 and not engine.has_work
        assert engine.last_stats.running == engine.last_stats.waiting == 0


@pytest.mark.parametrize(
    "kv", [{}, {"policy": "curdkv", "budget": "50%"}, {"policy": "adacurdkv", "budget": "50%"}]
)
def test_without_max_tokens_all_is_generated_that_the_pool_has_room_for(
    make_engine: MakeEngine, loaded: Loaded, kv: dict[str, str]
) -> None:
    engine = make_engine(num_pages=90 * 6)
    assert engine.max_kv_tokens == 6 * 32
    item = request(loaded.prompt(100), kv=parse_options(kv), max_tokens=None)
    most = engine.plan(item).max_tokens
    assert most == 6 * 32 - 100 + 1 if not kv else most > 6 * 32 - 100 + 1
    for asked, fits in ((most, True), (most + 1, False)):
        with nullcontext() if fits else pytest.raises(InvalidRequest, match="pages of KV cache"):
            engine.plan(request(loaded.prompt(100), asked, kv=parse_options(kv)))
    with pytest.raises(InvalidRequest, match="pages of KV cache") as caught:
        engine.plan(request(loaded.prompt(300), kv=parse_options({}), max_tokens=None))
    assert caught.value.param == "prompt"
    assert make_engine(num_pages=90 * 300).plan(item).max_tokens == 8192 - 100
    if not kv:
        assert len(tokens(run(engine, item)["r", 0])) == most


def test_priority_runs_first(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine = make_engine(max_sequences=1)
    order = []
    for index, priority in enumerate([5, 0, -1]):
        item = request(loaded.prompt(10), 1, id=str(index))
        item = replace(item, priority=priority)
        engine.add(engine.plan(item))
    while engine.has_work:
        order += [o.request_id for o in engine.step()]
    assert order == ["2", "1", "0"]


def test_eight_compressed_requests_run_where_three_full_ones_fit(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    def most_running(kv: dict[str, str]) -> int:
        engine = make_engine(num_pages=90 * 3 * 17, page_size=16)
        for index in range(12):
            item = request(loaded.prompt(256, start=index * 10), 16, id=str(index), kv=parse_options(kv))
            engine.add(engine.plan(item))
        most = 0
        for _ in range(24):
            engine.step()
            most = max(most, engine.last_stats.running)
        return most

    assert most_running({}) == 3
    assert most_running({"policy": "curdkv", "budget": "25%"}) >= 8


@pytest.mark.parametrize(
    ("prompt", "sampling", "kv", "param"),
    [
        ([], {}, {}, "prompt"),
        ([49152], {}, {}, "prompt"),
        ([-1], {}, {}, "prompt"),
        ([1] * 8190, {"max_tokens": 8}, {}, "max_tokens"),
        ([1] * 8193, {}, {}, "prompt"),
        ([1] * 2000, {"max_tokens": 4}, {}, "prompt"),
        ([1] * 500, {"max_tokens": 2000}, {}, "max_tokens"),
        ([1] * 10, {"logit_bias": {50000: 1.0}}, {}, "logit_bias"),
        ([1] * 10, {}, {"policy": "curdkv", "budget": "50%", "protect": "5-11"}, "kv.protect"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    make_engine: MakeEngine, prompt: list[int], sampling: dict[str, Any], kv: dict[str, str], param: str
) -> None:
    engine = make_engine(num_pages=90 * 40)
    with pytest.raises(InvalidRequest) as raised:
        engine.plan(request(prompt, kv=parse_options(kv), **sampling))
    assert raised.value.param == param
    assert engine.kv.used_pages == 0 and not engine.has_work
