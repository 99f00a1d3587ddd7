"""Conversations: a turn computes what is new, whatever was evicted before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curkv.cache.parsing import parse_options
from curkv.cache.sessions import MAX_STATES
from curkv.engine.engine import Engine
from curkv.engine.types import Output, Request

from .conftest import request, run, tokens
from .test_prefixes import HEADS, PAGE, PLENTY, prompt
from .test_prefixes import make_engine as make_exact_engine

SNAPKV = {"policy": "snapkv", "budget": "100", "observation": "16"}
POLICIES = {
    "full": {},
    "curdkv": {"policy": "curdkv", "budget": "100"},
    "quarter": {"policy": "adacurdkv", "budget": "25%"},
    "snapkv": SNAPKV,
    "decode": {"policy": "snapkv", "budget": "100", "decode_budget": "110", "decode_interval": "8"},
    "streaming": {"policy": "knorm", "budget": "100", "prefill": "streaming", "prefill_chunk": "64"},
    "merged": {"policy": "keydiff", "budget": "100", "merge": "nearest"},
    "h2o": {"policy": "h2o", "budget": "100"},
    "expected-attention": {"policy": "expected-attention", "budget": "100"},
    "compactor": {"policy": "compactor", "budget": "100"},
    "kvzip": {"policy": "kvzip", "budget": "99"},  # beside its last token
    "auto": {"policy": "auto", "budget": "99"},
}


def make_engine(num_pages: int = 2000, reuse_generated: bool = True, **others: int) -> Engine:
    exact = make_exact_engine(num_pages, PLENTY, **others)  # type: ignore[arg-type]
    return Engine(
        exact.runner, exact.info, exact.scheduler.max_step_tokens, exact.max_model_len,
        reuse_generated=reuse_generated, session_ttl=100.0,
    )  # fmt: skip


class Conversation:
    """Grows by what is said and answered."""

    def __init__(self, engine: Engine, kv: dict[str, str], session: str = "chat", answer: int = 20) -> None:
        self.engine, self.kv, self.session, self.answer = engine, kv, session, answer
        self.text: list[int] = []
        self.turn = 0

    def request(self, new: list[int]) -> Request:
        made = request([*self.text, *new], self.answer, f"{self.session}{self.turn}", parse_options(self.kv))
        return replace(made, session=self.session)

    def say(self, new: list[int]) -> list[Output]:
        """Asks, and takes the answer into the text; gives the answer's outputs."""
        asked = self.request(new)
        self.turn += 1
        outputs = run(self.engine, asked)[(asked.id, 0)]
        self.engine.check_integrity()
        assert self.engine.kv.used_pages == 0
        self.text = [*asked.prompt_token_ids, *tokens(outputs)]
        return outputs


def said(turn: int, length: int = 40) -> list[int]:
    return prompt(length, text=1000 + turn)


def test_a_turn_computes_only_what_is_new() -> None:
    """Generated tokens are cached; the last one of an answer never was computed."""
    chat = Conversation(make_engine(), {}, session="")
    for turn in range(6):
        before = len(chat.text)
        [*_, last] = chat.say(said(turn, 5 + 13 * turn))
        assert last.cached_tokens == max(0, before - 1)


def test_exact_caches_hold_prompts_alone() -> None:
    chat = Conversation(make_engine(reuse_generated=False), {}, session="")
    for turn in range(4):
        known = len(chat.text) - chat.answer
        [*_, last] = chat.say(said(turn))
        assert last.cached_tokens == max(0, known // PAGE * PAGE)


def test_the_past_may_be_rewritten() -> None:
    """Tokens are matched as far as they agree, as where a template leaves out the reasoning of answers."""
    chat = Conversation(make_engine(), {}, session="")
    chat.say(said(0))
    kept = chat.text[:50]
    chat.text = [*kept, (chat.text[50] + 1) % 97, 5]
    [*_, last] = chat.say(said(1))
    assert last.cached_tokens == 50


def test_the_end_of_a_text_is_held_once() -> None:
    """Each turn's last block, which is not full, gives way to the one that goes on from it."""
    engine = make_engine()
    chat = Conversation(engine, {}, session="")
    for turn in range(5):
        chat.say(said(turn))
    assert engine.kv.prefixes.held_pages == HEADS * -(-(len(chat.text) - 1) // PAGE)


@pytest.mark.parametrize("name", POLICIES)
def test_a_session_goes_on_from_what_it_held(name: str) -> None:
    """A turn computes its new tokens, and what it holds stays within the budget and one turn."""
    engine = make_engine()
    chat = Conversation(engine, POLICIES[name])
    for turn in range(8):
        before = len(chat.text)
        [*_, last] = chat.say(said(turn))
        assert last.cached_tokens == max(0, before - 1)
        assert last.kv is not None
        if chat.kv.get("budget") in ("99", "100"):
            assert last.kv.kept_tokens <= 100
    [told] = engine.sessions("")
    assert told.tokens == len(chat.text) - 1 and told.states == MAX_STATES and told.answers == 8
    if chat.kv.get("budget") in ("99", "100"):
        assert told.held_tokens <= 100 + 20


@pytest.mark.parametrize("name", ["full", "curdkv", "kvzip"])
def test_sessions_of_models_with_windows(name: str) -> None:
    """A state is gone on from as a whole; what a window has moved past is in none."""
    windowed = make_exact_engine(2000, PLENTY, window=40)
    engine = Engine(windowed.runner, windowed.info, 512, windowed.max_model_len, reuse_generated=True)
    chat, alone = Conversation(engine, POLICIES[name]), make_exact_engine(2000, window=40)
    for turn in range(5):
        before = len(chat.text)
        asked = request([*chat.text, *said(turn)], 20)
        answer = chat.say(said(turn))
        assert answer[-1].cached_tokens == max(0, before - 1)
        if name == "full":
            assert tokens(answer) == tokens(run(alone, asked)[(asked.id, 0)])
    chat.text = chat.text[:-7]
    assert chat.say(said(9))[-1].cached_tokens < len(chat.text) - 40


def test_a_session_holds_what_one_long_answer_would() -> None:
    """Where nothing is evicted in between, going on is what the sequence would have done itself."""
    kv = {"policy": "knorm", "budget": "100", "protect": "0-10"}
    chat = Conversation(make_engine(), kv)
    first = tokens(chat.say(said(0, 150)))
    whole = make_engine()
    both = request(said(0, 150), 40, "both", parse_options(kv))
    assert tokens(run(whole, both)[("both", 0)])[:20] == first
    again = replace(chat.request([]), prompt_token_ids=[*chat.text, *said(1, 30)])
    engine = chat.engine
    engine.add(engine.plan(replace(again, eviction=replace(again.eviction, protect=()))))
    engine.step()
    [sequence] = engine.scheduler.running
    positions = engine.runner.attention.view(sequence.slot).position
    assert all(set(range(10)) <= set(head.tolist()) for head in positions.flatten(0, 1))
    run(engine)


def test_protected_spans_last() -> None:
    chat = Conversation(make_engine(), {**SNAPKV, "protect": "20-40"})
    chat.say(said(0, 200))
    chat.kv = SNAPKV
    for turn in range(1, 5):
        chat.say(said(turn, 60))
    [state] = [p for p in chat.engine.kv.prefixes.all if p.tokens == len(chat.text) - 1 and p.evictions]
    pages = torch.from_numpy(state.table[:, :, : -(-int(state.lengths.max()) // PAGE)]).long()
    positions = chat.engine.kv.pages.position[pages].flatten(2)
    assert all(set(range(20, 40)) <= set(head.tolist()) for head in positions.flatten(0, 1))


@pytest.mark.parametrize("change", ["regenerate", "edit", "rewrite"])
def test_a_branch_starts_from_the_newest_state_that_fits(change: str) -> None:
    """Regenerated: from the end of the answer before; edited behind the last eviction: cut there."""
    engine = make_engine()
    chat = Conversation(engine, {"policy": "curdkv", "budget": "100"})
    chat.say(said(0, 150))
    chat.say(said(1))
    end_of_second = len(chat.text)
    answer = tokens(chat.say(said(2)))
    prompt_end = len(chat.text) - 20
    if change == "regenerate":
        chat.text = chat.text[:end_of_second]
        again = chat.say(said(2))
        assert again[-1].cached_tokens == end_of_second - 1 and tokens(again) == answer
    elif change == "edit":
        chat.text = chat.text[:end_of_second]
        assert chat.say(said(7))[-1].cached_tokens == end_of_second - 1
    else:  # the last answer is there, but for its end
        chat.text = chat.text[: prompt_end + 9]
        assert chat.say([3, 1, 4, 1, 5])[-1].cached_tokens >= prompt_end + 9


def test_choices_and_requests_at_once_branch() -> None:
    engine = make_engine()
    chat = Conversation(engine, {"policy": "curdkv", "budget": "100"})
    chat.say(said(0, 150))
    asked = chat.request(said(1))
    three = replace(asked, sampling=replace(asked.sampling, n=3, temperature=1.0, seed=4))
    other = replace(chat.request(said(2)), id="other")
    outputs = run(engine, three, other)
    assert {o[-1].cached_tokens for o in outputs.values()} == {len(chat.text) - 1}
    assert engine.sessions("")[0].states == MAX_STATES
    for key in ((three.id, 1), ("other", 0)):
        base = three if key[0] == three.id else other
        goes_on = [*base.prompt_token_ids, *tokens(outputs[key]), *said(5)]
        [*_, last] = run(engine, replace(chat.request([]), id="on", prompt_token_ids=goes_on))[("on", 0)]
        assert last.cached_tokens == len(base.prompt_token_ids) + 19


@pytest.mark.parametrize(
    "other",
    [
        {"session": "other"},
        {"owner": "bert"},
        {"cache_salt": "s"},
        {"eviction": parse_options({"policy": "curdkv", "budget": "101"})},
        {"eviction": parse_options({"policy": "knorm", "budget": "100"})},
    ],
)
def test_what_is_anothers_is_never_used(other: dict[str, object]) -> None:
    """Another session, key, salt or option is a fresh start."""
    engine = make_engine()
    chat = Conversation(engine, {"policy": "curdkv", "budget": "100"})
    chat.say(said(0, 150))
    item = replace(chat.request(said(1)), **other)
    [fresh] = run(make_engine(), item).values()
    [found] = run(engine, item).values()
    assert tokens(found) == tokens(fresh) and found[-1].cached_tokens <= 150
    assert not engine.sessions("anna")


def test_a_session_makes_no_prefix_of_what_it_evicted() -> None:
    """Blocks and contexts of prompts that went on from a state are not those of a prompt computed whole."""
    engine = make_engine()
    chat = Conversation(engine, {"policy": "curdkv", "budget": "100"})
    chat.say(said(0, 150))
    chat.kv = {**chat.kv, "context_tokens": str(len(chat.text) + 40)}
    asked = chat.request([*said(1), 1, 2, 3])
    run(engine, asked)
    alone = replace(asked, id="alone", session="")
    [found], [fresh] = run(engine, alone).values(), run(make_engine(), alone).values()
    assert tokens(found) == tokens(fresh) and found[-1].kv == fresh[-1].kv


def test_sessions_give_way_to_running_requests() -> None:
    """In a pool for one and a half conversations nothing is refused, and a dropped one starts afresh."""
    engine = make_engine(num_pages=HEADS * 14)
    chats = [Conversation(engine, {"policy": "curdkv", "budget": "60"}, session=f"s{i}") for i in range(4)]
    for turn in range(4):
        for chat in chats:
            chat.say(prompt(60, text=hash((turn, chat.session)) % 2**31))
    assert engine.last_stats.sessions < 4
    run(engine, request(prompt(400), 4, "large"))
    assert engine.last_stats.sessions == 0 == engine.last_stats.session_bytes
    engine.drop_prefixes()
    assert engine.kv.pool.num_free == engine.kv.num_pages


@pytest.mark.parametrize("kv", [{}, {"policy": "curdkv", "budget": "60"}, {"policy": "h2o", "budget": "60"}])
def test_preempted_turns_go_on_from_the_session(kv: dict[str, str]) -> None:
    """Several conversations in a small pool: whatever is preempted, answers are those of a large one."""
    tight, wide = make_engine(num_pages=HEADS * 14), make_engine()
    answers = []
    for engine in (tight, wide):
        chats = [Conversation(engine, kv, session=f"s{i}", answer=60) for i in range(4)]
        outputs = run(engine, *(chat.request(said(i, 60)) for i, chat in enumerate(chats)))
        answers.append([tokens(o) for o in outputs.values()])
        engine.check_integrity()
        assert engine.kv.used_pages == 0
    assert answers[0] == answers[1]


def test_aborts_and_drops_leak_nothing() -> None:
    engine = make_engine(max_step_tokens=64)
    chat = Conversation(engine, SNAPKV)
    chat.say(said(0, 150))
    for steps in (0, 1, 2, 6):
        asked = replace(chat.request(said(steps, 100)), id=f"gone{steps}")
        engine.add(engine.plan(asked))
        for _ in range(steps):
            engine.step()
        engine.abort(asked.id)
        engine.step()
        engine.check_integrity()
        assert engine.kv.used_pages == 0 and engine.kv.free_slots == 8
    assert engine.drop_session("", "none") is None and engine.drop_session("bert", "chat") is None
    held = engine.last_stats.session_bytes
    assert held == engine.sessions("")[0].bytes and engine.drop_session("", "chat") is not None
    engine.drop_prefixes()
    assert engine.kv.pool.num_free == engine.kv.num_pages and engine.sessions("") == []


def test_an_answer_that_was_cut_off_goes_on() -> None:
    """A client that goes away in mid-answer keeps what it has read."""
    engine = make_engine()
    chat = Conversation(engine, SNAPKV, answer=50)
    asked = chat.request(said(0, 150))
    engine.add(engine.plan(asked))
    read: list[int] = []
    while len(read) < 10:
        read += [token for output in engine.step() for token in output.token_ids]
    engine.abort(asked.id)
    chat.text = [*asked.prompt_token_ids, *read]
    assert chat.say(said(1))[-1].cached_tokens == len(read) + 150 - 1


def test_sessions_end_when_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = make_engine(), [0.0]
    monkeypatch.setattr(engine._reuse.sessions, "_clock", lambda: now[0])
    for name, at in (("old", 0.0), ("new", 60.0)):
        now[0] = at
        Conversation(engine, SNAPKV, session=name).say(said(0, 150))
    now[0] = 120.0
    [left] = engine.sessions("")
    assert (left.id, left.idle_seconds, left.expires_in_seconds) == ("new", 60.0, 40.0)


def test_tenants_drop_their_own_prefixes() -> None:
    engine = make_engine()
    compressed = {"policy": "knorm", "budget": "50%", "context_tokens": "80"}
    for tenant in ("anna", "bert"):
        for name, kv in (("plain", {}), ("context", compressed)):
            item = request(prompt(100), 4, f"{tenant}-{name}", parse_options(kv))
            run(engine, replace(item, tenant=tenant, cache_salt=tenant))
    held = engine.last_stats.prefix_bytes
    assert engine.drop_prefixes("anna") == held // 2
    engine.check_integrity()
    for tenant, cached in (("anna", 0), ("bert", 96)):
        item = replace(request(prompt(100), 4, tenant), tenant=tenant, cache_salt=tenant)
        assert run(engine, item)[(tenant, 0)][-1].cached_tokens >= cached


def test_dropping_prefixes_leaves_sessions() -> None:
    engine = make_engine()
    chat = Conversation(engine, SNAPKV)
    chat.say(said(0, 150))
    engine.drop_prefixes()
    assert chat.say(said(1))[-1].cached_tokens == 169


@pytest.mark.parametrize("phase", ["leave", "adopt"])
def test_a_fault_at_a_session_costs_no_answer(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be held is computed anew; what cannot be taken ends in an error, and nothing leaks."""
    engine = make_engine()
    chat = Conversation(engine, SNAPKV)
    chat.say(said(0, 150))

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    target: tuple[object, str] = (engine, "_leave") if phase == "leave" else (engine.kv, "adopt")
    with monkeypatch.context() as patch:
        patch.setattr(*target, broken)
        asked = chat.request(said(1))
        [outputs] = run(engine, asked).values()
    assert outputs[-1].finish_reason == ("length" if phase == "leave" else "error")
    engine.check_integrity()
    assert engine.kv.used_pages == 0 and engine.kv.free_slots == 8
    assert run(engine, replace(asked, id="again"))[("again", 0)][-1].cached_tokens == 169
