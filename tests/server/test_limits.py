"""Who may ask, from where, how much, how slowly and for how long."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from curkv.models.vocabulary import Vocabulary
from curkv.server.run import StartupError, serve
from tests.server.scripted import ScriptedClient, running, until
from tests.server.test_run import served, wait_for

BODY = {"prompt": "w1", "max_tokens": 3}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def server(engine: ScriptedClient, **settings: Any) -> Iterator[httpx.Client]:
    with (
        running(engine, Settings(served_model_name="words", **settings)) as url,
        httpx.Client(base_url=url, timeout=10) as http,
    ):
        yield http


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


def test_every_route_but_health_and_metrics_wants_a_key(engine: ScriptedClient) -> None:
    with server(engine, api_key=("one", "two")) as http:
        paths = [
            "/", "/v1/models", "/v1/models/words", "/version", "/docs", "/openapi.json", "/v1/kv/state",
            "/page/main.js", "/no/such/path",
        ]  # fmt: skip
        wrong = [{}, {"Authorization": "Bearer three"}, {"Authorization": "Bearer"}]
        wrong += [{"Authorization": basic("three")}, {"Authorization": "Basic %%%"}, {"Authorization": "one"}]
        for headers in wrong:
            for path in paths:
                refused = http.get(path, headers=headers)
                assert refused.status_code == 401, path
                assert refused.json()["error"]["type"] == "authentication_error"
                assert "Bearer" in refused.headers["www-authenticate"] and refused.headers["x-request-id"]
            assert http.post("/v1/completions", json=BODY, headers=headers).status_code == 401
            assert http.get("/health", headers=headers).status_code == 200
            assert http.get("/metrics", headers=headers).status_code == 200
        assert not engine.taken
        for header in ("Bearer one", "bearer two", basic("one")):
            assert http.get("/v1/models", headers={"Authorization": header}).status_code == 200
        document = http.get("/openapi.json", headers={"Authorization": "Bearer one"}).json()
        assert document["paths"]["/v1/completions"]["post"]["security"]
        assert "401" in document["paths"]["/v1/completions"]["post"]["responses"]


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURKV_API_KEY", "sesame, two")
    assert Settings.load().server.api_key == ("sesame", "two")
    assert "sesame" not in repr(Settings.load())


def test_other_origins_are_refused_unless_named(engine: ScriptedClient) -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with server(engine) as http:
        assert "access-control-allow-origin" not in http.get("/version", headers=preflight).headers
        assert http.options("/v1/completions", headers=preflight).status_code == 405
    with server(engine, cors_origin=("https://a.example",), api_key=("one",)) as http:
        allowed = http.options("/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = http.get("/version", headers=preflight)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = http.get("/version", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_failures_reach_web_pages_too(engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedClient, "plan", lambda *_: 1 / 0)
    with server(engine, cors_origin=("https://a.example",)) as http:
        failed = http.post("/v1/completions", json=BODY, headers={"Origin": "https://a.example"})
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        assert failed.headers["access-control-allow-origin"] == "https://a.example"
        assert failed.headers["x-request-id"]


def test_a_full_queue(engine: ScriptedClient) -> None:
    with server(engine, max_waiting=2) as http, ThreadPoolExecutor() as others:
        engine.waits = True
        waiting = [others.submit(http.post, "/v1/completions", json=BODY)]
        wait_until(lambda: len(engine.taken) == 1)
        waiting.append(others.submit(http.post, "/v1/completions", json=BODY))
        wait_until(lambda: len(engine.taken) == 2)
        for path in ("/v1/completions", "/v1/kv/explain"):
            refused = http.post(path, json=BODY)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        engine.waits = False
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_many_prompts_at_once_are_counted_before_they_wait(engine: ScriptedClient) -> None:
    engine.waits = True
    with server(engine) as http, ThreadPoolExecutor(6) as others:
        body = {"prompt": ["w1"] * 400, "max_tokens": 1}
        answers = [others.submit(http.post, "/v1/completions", json=body) for _ in range(6)]
        wait_until(lambda: sum(answer.done() for answer in answers) == 4)
        engine.waits = False
        assert sorted(answer.result().status_code for answer in answers) == [200, 200, 429, 429, 429, 429]


def test_who_has_gone_waits_no_more(engine: ScriptedClient) -> None:
    engine.waits = True
    with server(engine, max_waiting=1) as http:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=BODY, timeout=0.3)
            taken = len(engine.taken)
            wait_until(lambda: len(engine.closed) == taken)  # noqa: B023
        engine.waits = False
        assert http.post("/v1/completions", json=BODY).status_code == 200
    assert len(engine.taken) == 4


@pytest.mark.parametrize("by_header", [False, True])
def test_a_request_that_takes_too_long(engine: ScriptedClient, by_header: bool) -> None:
    engine.delay = 0.1
    headers = {"X-Request-Timeout": "0.25"} if by_header else {}
    with server(engine, request_timeout=60 if by_header else 0.25) as http:
        body = {"prompt": ["w1", "w2"], "max_tokens": 100}
        late = http.post("/v1/completions", json=body, headers=headers)
        assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
        stream = http.post("/v1/completions", json={**body, "stream": True}, headers=headers)
        assert stream.status_code == 200 and '"code":"timeout"' in stream.text
        assert http.post("/v1/completions", json={"prompt": "w1", "max_tokens": 1}).status_code == 200
    assert len(engine.closed) == len(engine.taken) == 5


def test_priority_by_header_wins(engine: ScriptedClient) -> None:
    with server(engine) as http:
        http.post("/v1/completions", json={**BODY, "priority": 3}, headers={"X-Priority": "-2"})
        http.post("/v1/completions", json={**BODY, "priority": 3})
        assert [request.priority for request in engine.taken] == [-2, 3]


@pytest.mark.parametrize(
    "headers",
    [
        *({"X-Priority": value} for value in ("", "high", "1.5", "2147483648", "9" * 5000)),
        *({"X-Request-Timeout": value} for value in ("", "0", "-1", "nan", "1e3", "soon")),
    ],
)
def test_bad_header(engine: ScriptedClient, headers: dict[str, str]) -> None:
    with server(engine) as http:
        refused = http.post("/v1/completions", json=BODY, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == next(iter(headers))
    assert not engine.taken


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"GET /health HT"],
        [b"G", b"E", b"T", b" ", b"/", b"h", b"e", b"a", b"l", b"t", b"h"],
        [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /he"],
    ],
)
async def test_a_header_that_does_not_come_closes_the_connection(
    engine: ScriptedClient, parts: list[bytes]
) -> None:
    async with asyncio.timeout(20):
        with served(lambda _: engine, receive_timeout=0.5) as (_, http):
            await wait_for(http, "ready")
            reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
            started = time.monotonic()
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.02)
            received = await reader.read()
            assert time.monotonic() - started < 5
            assert received.count(b"HTTP/1.1 200") == (len(parts) == 2)
            writer.close()


async def test_a_body_that_does_not_come_is_a_408(engine: ScriptedClient) -> None:
    async with asyncio.timeout(20):
        with served(lambda _: engine, receive_timeout=0.5) as (_, http):
            await wait_for(http, "ready")
            reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 100\r\n\r\n{"prompt": '
            )
            received = await reader.read()
            assert b"408 Request Timeout" in received and b"body_too_slow" in received
            writer.close()
    assert not engine.taken


async def test_who_goes_on_after_a_413_is_cut_off(
    engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curkv.server.connections.LINGER_SECONDS", 0.3)
    async with asyncio.timeout(20):
        with served(lambda _: engine, max_body_size=1000) as (_, http):
            await wait_for(http, "ready")
            reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            assert b"413" in await reader.readline()
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("body", "accepted"),
    [
        ({"prompt": list(range(200)), "max_tokens": 1}, True),
        ({"prompt": [1] * 300, "max_tokens": 1}, False),
        ({"prompt": "w1, [w2], {w3} " * 10 + '\\\\ \\" , ' * 40, "max_tokens": 1}, True),
        ({"prompt": "w1", "stop_token_ids": ["a"] * 400}, False),
        ({"prompt": "w1", "x": [[[]]] * 100}, False),
    ],
)
def test_values_of_a_body_are_counted_and_commas_of_texts_are_not(
    engine: ScriptedClient, body: dict[str, Any], accepted: bool
) -> None:
    with server(engine, max_body_values=256) as http:
        for content in (json.dumps(body), json.dumps(body, indent=1, ensure_ascii=False)):
            for size in (7, 10_000):
                pieces = (content[i : i + size].encode() for i in range(0, len(content), size))
                answer = http.post(
                    "/v1/completions", content=pieces, headers={"Content-Type": "application/json"}
                )
                assert (answer.status_code == 200) == accepted, answer.text
                assert accepted or answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"stop_token_ids": ["a"] * 1025}, "stop_token_ids"),
        ({"logit_bias": {str(i): 200 for i in range(1025)}}, "logit_bias"),
        ({"kv": {"policy": "snapcur", "budget": "50%", "protect": [[0, 1]] * 1025}}, "kv"),
        ({"kv": {"policy": "snapcur", "budget": "50%", "protect": "0-1," * 10_000}}, "kv"),
        ({"guided_json": {"enum": ["x" * 1000] * 101}}, "guided_json"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice"),
        ({"min_tokens": 5, "max_tokens": 4}, "max_tokens"),
    ],
)
def test_lists_of_a_request_are_bounded(engine: ScriptedClient, body: dict[str, Any], param: str) -> None:
    with server(engine) as http:
        refused = http.post("/v1/completions", json={**BODY, **body})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
        assert len(refused.text) < 1000


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vocabulary, "least_tokens", lambda _, text: len(text) // 100)
    monkeypatch.setattr(Vocabulary, "encode", lambda *_: pytest.fail("tokenized"))
    monkeypatch.setattr(Vocabulary, "encode_with_ends", lambda *_: pytest.fail("tokenized"))
    text = "w1 " * 10_000
    conversation = {"messages": [{"role": "user", "content": text}]}
    with server(engine) as http:
        for path in ("/tokenize", "/v1/kv/explain", "/v1/completions"):
            refused = http.post(path, json={"prompt": text})
            assert refused.status_code == 400 and "at least 300 tokens" in refused.json()["error"]["message"]
        for path in ("/tokenize", "/v1/kv/explain", "/v1/chat/completions"):
            assert http.post(path, json=conversation).json()["error"]["param"] == "messages"


def test_tokens_that_wait_are_counted(engine: ScriptedClient) -> None:
    with server(engine, max_waiting_tokens=300) as http, ThreadPoolExecutor() as others:
        alone = http.post("/v1/completions", json={"prompt": ["w1 " * 100] * 4, "max_tokens": 1})
        assert alone.status_code == 400 and alone.json()["error"]["param"] == "prompt"
        engine.waits = True
        waiting = others.submit(http.post, "/v1/completions", json={"prompt": "w1 " * 200, "max_tokens": 1})
        wait_until(lambda: len(engine.taken) == 1)
        refused = http.post("/v1/completions", json={"prompt": "w1 " * 101, "max_tokens": 1})
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        engine.waits = False
        assert waiting.result().status_code == 200


@pytest.mark.parametrize(
    "field",
    ["ignore_eos", "min_tokens", "priority", "n", "temperature", "stop", "stop_token_ids", "logit_bias"],
)
def test_null_is_the_default(engine: ScriptedClient, field: str) -> None:
    with server(engine) as http:
        assert http.post("/v1/completions", json={**BODY, field: None}).status_code == 200
        [request] = engine.taken
        assert http.post("/v1/completions", json=BODY).status_code == 200
        assert engine.taken[1].sampling == request.sampling and request.priority == 0


async def test_a_slow_answer_is_not_cut_off(engine: ScriptedClient) -> None:
    engine.delay = 0.1
    with served(lambda _: engine, receive_timeout=0.3) as (_, http):
        await wait_for(http, "ready")
        answer = await http.post("/v1/completions", json={"prompt": "w1", "max_tokens": 10})
        assert answer.status_code == 200


async def test_https(engine: ScriptedClient, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout {key} -out {certificate} "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    with served(lambda _: engine, ssl_certfile=certificate, ssl_keyfile=key) as (server, http):
        await until(lambda: server.started)
        context = ssl.create_default_context(cafile=certificate)
        async with httpx.AsyncClient(verify=context) as https:
            url = f"https://127.0.0.1:{http.base_url.port}/health"
            assert (await https.get(url)).status_code == 200


@pytest.mark.parametrize("names", [("ssl_certfile",), ("ssl_keyfile",), ("ssl_certfile", "ssl_keyfile")])
def test_a_certificate_that_cannot_be_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(StartupError, match="--ssl-"):
        serve(Settings(port=0, **dict.fromkeys(names, tmp_path / "bad.pem")))
