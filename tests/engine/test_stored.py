"""Prefixes and sessions on disk: another engine over the same directory goes on where this one was."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from curkv.cache.parsing import parse_options
from curkv.cache.store import Store
from curkv.engine.engine import Engine

from .conftest import request, run, tokens
from .test_prefixes import PAGE, PLENTY, prompt
from .test_prefixes import make_engine as make_exact_engine
from .test_sessions import POLICIES, Conversation, said


def make_engine(directory: Path, num_pages: int = 2000, ttl: float = 100.0) -> Engine:
    exact = make_exact_engine(num_pages, PLENTY)
    engine = Engine(
        exact.runner, exact.info, 512, exact.max_model_len,
        reuse_generated=True, session_ttl=ttl,
    )  # fmt: skip
    engine.keep_on_disk(Store(directory, "small", 1 << 30))
    return engine


def restarted(engine: Engine, directory: Path) -> Engine:
    engine.close(5)
    return make_engine(directory)


@pytest.mark.parametrize(
    "name", [name for name in POLICIES if name not in ("expected-attention", "compactor")]
)
def test_a_session_goes_on_after_a_restart(name: str, tmp_path: Path) -> None:
    """The answers are those of an engine that was not restarted."""
    stays, stops = (Conversation(make_engine(tmp_path / n), POLICIES[name]) for n in ("a", "b"))
    for turn in range(4):
        if turn == 2:
            stops.engine = restarted(stops.engine, tmp_path / "b")
        before = len(stops.text)
        first, second = stays.say(said(turn, 60)), stops.say(said(turn, 60))
        assert tokens(first) == tokens(second)
        if turn == 2:
            expected = before - 1 if name not in ("full",) else (before - 1) // PAGE * PAGE
            assert second[-1].cached_tokens == expected
            store = stops.engine.last_stats.store
            assert store.hits >= 1 and store.saved_tokens == expected and store.read_seconds > 0
    assert stops.engine.sessions("")[0].tokens == len(stops.text) - 1


def test_a_compressed_context_and_hot_blocks_outlive_the_process(tmp_path: Path) -> None:
    """Blocks are written once they were found by a second prompt."""
    engine = make_engine(tmp_path)
    compressed = parse_options({"policy": "curdkv", "budget": "25%", "context_tokens": "200"})
    context = request([*prompt(200, text=1), 1, 2, 3], 4, "context", compressed)
    expected = [tokens(o) for o in run(engine, context).values()]
    plain = [request([*prompt(200, text=2), *said(i)], 4, f"plain{i}") for i in range(3)]
    expected += [tokens(run(engine, item)[(item.id, 0)]) for item in plain[:2]]
    once = request(prompt(200, text=3), 4, "once")
    run(engine, once)
    engine = restarted(engine, tmp_path)
    found = [run(engine, item)[(item.id, 0)] for item in (context, *plain[:2], once)]
    assert [tokens(o) for o in found[:3]] == expected
    assert [o[-1].cached_tokens for o in found] == [200, 192, 200, 0]
    assert engine.last_stats.store.saved_tokens == 200 + 192


def test_replicas_share_a_directory(tmp_path: Path) -> None:
    """A session that moves between two engines goes on from the newest turn, whoever answered it."""
    one, two = make_engine(tmp_path), make_engine(tmp_path)
    chat = Conversation(one, POLICIES["snapkv"])
    for turn, engine in enumerate((one, one, two, two, one)):
        chat.engine = engine
        before = len(chat.text)
        assert chat.say(said(turn, 60))[-1].cached_tokens == max(0, before - 1)
        settle(engine)


def settle(engine: Engine) -> None:
    """Waits until what was put is on disk."""
    assert engine._reuse.store is not None
    while engine._reuse.store._queued:
        time.sleep(0.005)


def test_tenants_share_nothing_on_disk(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    chat = Conversation(engine, POLICIES["curdkv"])
    item = replace(chat.request(said(0, 150)), tenant="anna", cache_salt="anna")
    answer = tokens(run(engine, item)[(item.id, 0)])
    engine = restarted(engine, tmp_path)
    more = replace(item, prompt_token_ids=[*item.prompt_token_ids, *answer, *said(1)])
    for tenant, cached in (("bert", 0), ("", 0), ("anna", 169)):
        asked = replace(more, id=tenant or "none", tenant=tenant, owner=tenant, cache_salt=tenant)
        assert run(engine, asked)[(asked.id, 0)][-1].cached_tokens == cached


def test_what_is_dropped_is_gone_from_the_disk(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    chat = Conversation(engine, POLICIES["curdkv"])
    chat.say(said(0, 150))
    plain = request([*prompt(200, text=2), 1, 2], 4, "plain")
    for _ in range(2):
        run(engine, plain)
    settle(engine)
    assert engine.drop_session("", "chat") is not None and engine.drop_session("", "chat") is None
    engine.drop_prefixes()
    engine = restarted(engine, tmp_path)
    assert run(engine, plain)[("plain", 0)][-1].cached_tokens == 0
    assert not list(tmp_path.rglob("sessions/*/*"))


def test_a_session_on_disk_ends_as_well(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    chat = Conversation(engine, POLICIES["curdkv"])
    chat.say(said(0, 150))
    engine.close(5)
    chat.engine = make_engine(tmp_path, ttl=1e-9)
    assert chat.say(said(1))[-1].cached_tokens == 0


def test_a_small_pool_takes_what_fits(tmp_path: Path) -> None:
    """Without room for what was read, the prompt is computed; nothing leaks."""
    engine = make_engine(tmp_path)
    items = [request([*prompt(300, text=i), 1, 2], 4, f"{i}") for i in range(3)]
    for item in (*items, *items):
        run(engine, item)
    engine.close(5)
    small = make_engine(tmp_path, num_pages=4 * 12)
    planned = [small.plan(item) for item in items]
    for one in planned:
        small.add(one)
    answers = {}
    while small.has_work:
        for output in small.step():
            answers.setdefault(output.request_id, []).append(output)
        small.check_integrity()
    whole = make_exact_engine()
    for item in items:
        assert tokens(answers[item.id]) == tokens(run(whole, item)[(item.id, 0)])
    small.drop_prefixes()
    assert small.kv.pool.num_free == small.kv.num_pages


def test_a_store_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tmp_path)

    def broken(*_: object) -> None:
        raise OSError("gone")

    for name in ("load", "names"):
        monkeypatch.setattr(engine._reuse.store, name, broken)
    chat = Conversation(engine, POLICIES["snapkv"])
    for turn in range(3):
        before = len(chat.text)
        assert chat.say(said(turn, 60))[-1].cached_tokens == max(0, before - 1)
