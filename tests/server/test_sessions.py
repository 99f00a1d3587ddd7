"""How a request names its session, and who sees which."""

from __future__ import annotations

import httpx
import pytest

from curkv.config import Settings
from tests.server.scripted import ScriptedClient, running

BODY = {"prompt": "w1", "max_tokens": 1}


async def test_a_session_is_named_by_header_or_body(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    chat = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 1}
    for path, body, headers in (
        ("/v1/completions", BODY, {}),
        ("/v1/completions", {**BODY, "kv": {"session": "a"}}, {}),
        ("/v1/chat/completions", {**chat, "kv": {"session": "a"}}, {"X-KV-Session": "b@c:1~+=-_."}),
    ):
        assert (await http.post(path, json=body, headers=headers)).status_code == 200
    assert [request.session for request in engine.taken] == ["", "a", "b@c:1~+=-_."]
    assert all(request.eviction.policy == "full" for request in engine.taken)


@pytest.mark.parametrize("name", ["a b", "a/b", "x" * 129, "ä", 5, ["a"], {}])
async def test_a_bad_name_is_refused(http: httpx.AsyncClient, engine: ScriptedClient, name: object) -> None:
    answer = await http.post("/v1/completions", json={**BODY, "kv": {"session": name}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "kv.session"
    if isinstance(name, str) and name.isascii():
        answer = await http.post("/v1/completions", json=BODY, headers={"X-KV-Session": name})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-KV-Session"
    assert not engine.taken


async def test_an_explanation_has_no_session(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/kv/explain", json={"prompt": "w1"}, headers={"X-KV-Session": "a"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-KV-Session"


def test_sessions_are_those_of_a_key(engine: ScriptedClient) -> None:
    settings = Settings(served_model_name="words", api_key=("one", "two"))
    one, two = ({"Authorization": f"Bearer {key}"} for key in settings.server.api_key)
    with running(engine, settings) as url, httpx.Client(base_url=url) as http:
        http.post("/v1/completions", json={**BODY, "kv": {"session": "a"}}, headers=one)
        assert http.get("/v1/kv/sessions", headers=two).json() == {"data": []}
        assert http.delete("/v1/kv/sessions/a", headers=two).json()["error"]["code"] == "session_not_found"
        [listed] = http.get("/v1/kv/sessions", headers=one).json()["data"]
        assert listed == {
            "id": "a", "policy": "full", "tokens": 9, "held_tokens": 4.0, "bytes": 4096, "states": 1,
            "answers": 1, "idle_seconds": 2.0, "expires_in_seconds": 98.0,
        }  # fmt: skip
        freed = http.delete("/v1/kv/sessions/a", headers=one)
        assert (freed.status_code, freed.json()) == (200, {"id": "a", "freed_bytes": 4096})


async def test_a_context_asks_for_how_long_it_stays(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    """The longest time that any mark says; none if none does."""

    def message(ttl: dict[str, str]) -> dict[str, object]:
        part = {"type": "text", "text": "w1", "cache_control": {"type": "ephemeral", **ttl}}
        return {"role": "user", "content": [part]}

    for marks in ([{}], [{"ttl": "5m"}], [{"ttl": "1h"}, {"ttl": "5m"}]):
        body = {"messages": [message(mark) for mark in marks], "max_tokens": 1}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert [request.context_ttl for request in engine.taken] == [0.0, 300.0, 3600.0]
