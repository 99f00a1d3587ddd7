"""Prefill chunks shrink so that those who wait for their next token do not wait long."""

from __future__ import annotations

from collections.abc import Callable

from curkv.engine.engine import Engine
from curkv.engine.pace import LEAST_TOKENS, Pace
from tests.engine.conftest import Loaded, request


def learned(max_itl: float | None, token_seconds: float, decode_seconds: float = 0.02) -> Pace:
    pace = Pace(max_itl, 512)
    pace.observe(0, 512, 512 * token_seconds)
    pace.observe(8, 0, decode_seconds)
    for _ in range(8):
        pace.observe(8, 100, decode_seconds + 100 * token_seconds)
    return pace


def test_a_step_without_decodes_is_not_limited() -> None:
    assert learned(0.1, 0.002).tokens(0) == 512


def test_without_a_target_no_step_is_limited() -> None:
    assert learned(None, 0.002).tokens(8) == 512


def test_the_planned_step_keeps_to_the_target_and_uses_most_of_it() -> None:
    prompt_tokens = learned(0.5, 0.002).tokens(8) - 8
    assert 0.75 * 0.5 < 0.02 + prompt_tokens * 0.002 < 0.5


def test_chunks_follow_a_cost_that_grows_with_the_context() -> None:
    pace = learned(0.5, 0.002)
    before = pace.tokens(8)
    for _ in range(6):
        pace.observe(8, 100, 0.02 + 100 * 0.004)
    assert 0.45 * before < pace.tokens(8) < 0.55 * before


def test_a_prefill_goes_on_however_slow_it_is() -> None:
    assert learned(0.01, 0.1).tokens(8) == 8 + LEAST_TOKENS


def test_what_the_host_did_not_wait_for_is_counted_where_it_did() -> None:
    waited, ran_ahead = Pace(0.5, 512), Pace(0.5, 512)
    waited.observe(0, 300, 0.6)
    for seconds, sampled in ((0.001, False), (0.001, False), (0.598, True)):
        ran_ahead.observe(0, 100, seconds, sampled)
    assert ran_ahead.tokens(1) == waited.tokens(1) < 512


def test_what_compilation_cost_is_forgotten() -> None:
    pace = Pace(0.1, 512)
    pace.observe(0, 512, 120.0)
    pace.forget()
    pace.observe(0, 512, 0.5)
    assert pace.tokens(1) > 50


def test_a_long_prompt_is_read_in_small_chunks_while_another_request_generates(
    make_engine: Callable[..., Engine], loaded: Loaded
) -> None:
    engine = make_engine(max_itl=1e-6)
    waiting, long = request(loaded.prompt(40), 12, "waiting"), request(loaded.prompt(600, 100), 1, "long")
    engine.add(engine.plan(waiting))
    while not engine.step():
        pass
    engine.add(engine.plan(long))
    read = []
    while engine.scheduler.find("waiting"):
        engine.step()
        read.append(engine.last_stats.prompt_tokens)
    assert read[1:] == [LEAST_TOKENS] * len(read[1:])
    engine.step()
    assert engine.last_stats.prompt_tokens == min(512, 600 - sum(read))
