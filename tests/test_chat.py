"""The terminal client against a scripted server."""

from __future__ import annotations

from pathlib import Path

import pytest

from curkv.chat import Conversation, loop
from curkv.config import Settings
from tests.server.scripted import ScriptedClient, running

SETTINGS = Settings(served_model_name="words")


def say(conversation: Conversation, *lines: str) -> str:
    """Plays lines and gives what was written."""
    remaining, written = iter(lines), []

    def read() -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    loop(conversation, read, written.append)
    return "".join(written)


def test_answers_usage_and_memory_of_what_was_said() -> None:
    engine = ScriptedClient()
    with running(engine, SETTINGS) as url:
        talk = Conversation(url, document="w7 w8", max_tokens=2)
        written = say(talk, "w10", "/policy curdkv 50%", "", "w11", "/clear", "w12")
    assert written.count(" w1 w2\n[") == 3
    assert "full: kept 100% of the prompt" in written and "curdkv: kept " in written
    prompts = [request.prompt_token_ids for request in engine.taken]
    assert prompts[0] == [1, 7, 8, 10, 3]
    assert prompts[1] == [1, 7, 8, 10, 2, 1, 2, 1, 11, 3]
    assert prompts[2] == [1, 7, 8, 12, 3]
    assert engine.taken[1].eviction.context_tokens == 3


def test_a_named_conversation_goes_on(tmp_path: Path) -> None:
    """In another process too; the server is told its session, whatever the policy."""
    engine, file = ScriptedClient(), tmp_path / "conversations" / "chat-1.json"
    with running(engine, SETTINGS) as url:
        say(Conversation(url, max_tokens=2, session="chat-1", file=file), "w10", "/policy curdkv 50%", "w11")
        say(Conversation(url, max_tokens=2, session="chat-1", file=file), "w12", "/clear", "w13")
    assert [request.session for request in engine.taken] == ["chat-1"] * 4
    prompts = [request.prompt_token_ids for request in engine.taken]
    assert prompts[2] == [*prompts[1][:-1], 2, 1, 2, 1, 12, 3] and prompts[3] == [1, 13, 3]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_refused_question_is_forgotten() -> None:
    engine = ScriptedClient()
    with running(engine, SETTINGS) as url:
        talk = Conversation(url)
        written = say(talk, "/policy no-such", "w10", "/policy full", "w11", "/help", "/quit", "w12")
    assert "400: no policy 'no-such'" in written and "/clear" in written
    assert [request.prompt_token_ids for request in engine.taken] == [[1, 11, 3]]


@pytest.mark.parametrize("failure", ["error"])
def test_a_failure_in_mid_answer_is_said(failure: str) -> None:
    with running(ScriptedClient(fail_after=1, failure=failure), SETTINGS) as url:
        talk = Conversation(url)
        assert "the engine failed" in say(talk, "w10")
        assert talk.messages == []


def test_no_server() -> None:
    assert "onnect" in say(Conversation("http://127.0.0.1:9"), "w1")
