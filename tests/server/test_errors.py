"""Bad input is a 4xx that names the field or header and reaches no engine; failures are told apart."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from tests.server.scripted import MAX_MODEL_LEN, ScriptedClient, running, until

BASE: dict[str, Any] = {"model": "words", "prompt": "w1 w2 w3 w4 w5 w6 w7 w8"}


def check(response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["w1", ""]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"text": "w1"}}, "prompt"),
        ({"prompt": ["w1", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[1], "w1"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["w1"] * 2000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"prompt": ["w1"] * 20, "n": 100}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"w1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"suffix": "w9"}, "suffix"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"structured_outputs": {"grammars": "x"}}, "structured_outputs.grammars"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"best_of": 3}, "best_of"),
        ({"priority": 2**31}, "priority"),
        ({"kv": "25%"}, "kv"),
        ({"kv": {"policy": "keep-all"}}, "kv.policy"),
        ({"kv": {"policy": "curdkv"}}, "kv.budget"),
        ({"kv": {"budget": "25%"}}, "kv.budget"),
        ({"kv": {"budgets": "25%"}}, "kv.budgets"),
        ({"kv": {"policy": "curdkv", "budget": 0}}, "kv.budget"),
        ({"kv": {"policy": "curdkv", "budget": -1}}, "kv.budget"),
        ({"kv": {"policy": "curdkv", "budget": 1.01}}, "kv.budget"),
        ({"kv": {"policy": "curdkv", "budget": "1e999"}}, "kv.budget"),
        ({"kv": {"policy": "curdkv", "budget": [1]}}, "kv.budget"),
        ({"kv": {"policy": "curdkv", "budget": "50%", "protect": [[0, 9]]}}, "kv.protect"),
        ({"kv": {"policy": "curdkv", "budget": "50%", "protect": "5-3"}}, "kv.protect"),
        ({"kv": {"policy": "curdkv", "budget": "50%", "seed": "x"}}, "kv.seed"),
    ],
)
async def test_bad_field(
    http: httpx.AsyncClient, engine: ScriptedClient, change: dict[str, Any], param: str
) -> None:
    check(await http.post("/v1/completions", json={**BASE, **change}), 400, param)
    assert not engine.taken


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-KV-Policy": "keep-all"}, "X-KV-Policy"),
        ({"X-KV-Policy": "curdkv"}, "X-KV-Budget"),
        ({"X-KV-Budget": "25%"}, "X-KV-Budget"),
        ({"X-KV-Polcy": "curdkv"}, "X-KV-Polcy"),
        *(
            ({"X-KV-Policy": "curdkv", "X-KV-Budget": value}, "X-KV-Budget")
            for value in ("0", "-1", "101%", "abc", "1e999", "nan", "", "0%", "1.5tok", "8MB?", "9" * 400)
        ),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Decode-Budget": "0"}, "X-KV-Decode-Budget"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Sink-Tokens": "-4"}, "X-KV-Sink-Tokens"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Recent-Tokens": "x"}, "X-KV-Recent-Tokens"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Protect": "0-9"}, "X-KV-Protect"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Protect": "a-b"}, "X-KV-Protect"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Seed": "1.5"}, "X-KV-Seed"),
        ({"X-KV-Policy": "curdkv", "X-KV-Budget": "2tok", "X-KV-Sink-Tokens": "4"}, "X-KV-Budget"),
    ],
)
async def test_bad_header(
    http: httpx.AsyncClient, engine: ScriptedClient, headers: dict[str, str], param: str
) -> None:
    check(await http.post("/v1/completions", json=BASE, headers=headers), 400, param)
    assert not engine.taken


async def test_header_given_twice(http: httpx.AsyncClient) -> None:
    headers = [("X-KV-Policy", "full"), ("X-KV-Policy", "curdkv")]
    check(await http.post("/v1/completions", json=BASE, headers=headers), 400, "X-KV-Policy")


@pytest.mark.parametrize(
    "body", [b"[]", b'"text"', b"5", b"null", b"", b"{", b'{"prompt": ', b"\xff\xfe", b'{"a":NaN']
)
async def test_body_that_is_no_object(http: httpx.AsyncClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    check(await http.post("/v1/completions", content=body, headers=headers), 400, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "w1", "temperature": NaN}', "temperature"),
        (b'{"prompt": "w1", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "w1", "kv": {"policy": "curdkv", "budget": 1e999}}', "kv.budget"),
        (b'{"prompt": "w\\ud800"}', "prompt"),
        (b'{"prompt": "w1", "stop": "\\ud800"}', "stop"),
        (b'{"prompt": "w1", "kv": {"\\ud800": 1}}', "kv.\\ud800"),
        (b'{"max_tokens": 3}', "prompt"),
    ],
)
async def test_odd_json(http: httpx.AsyncClient, body: bytes, param: str) -> None:
    headers = {"Content-Type": "application/json"}
    check(await http.post("/v1/completions", content=body, headers=headers), 400, param)


async def test_content_type_must_be_json(http: httpx.AsyncClient) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    error = check(await http.post("/v1/completions", content=b"{}", headers=form), 400, None)
    assert "Content-Type: application/json" in error["message"]


async def test_unknown_model(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    error = check(await http.post("/v1/completions", json={**BASE, "model": "gpt-5"}), 404, "model")
    assert error["code"] == "model_not_found"
    assert not engine.taken


async def test_unknown_path_and_method(http: httpx.AsyncClient) -> None:
    check(await http.get("/v1/nothing"), 404, None)
    assert check(await http.get("/v1/completions"), 405, None)
    assert (await http.get("/v1/completions")).headers["allow"] == "POST"


@pytest.mark.parametrize("declared", [True, False])
async def test_body_over_the_limit(http: httpx.AsyncClient, engine: ScriptedClient, declared: bool) -> None:
    body = b'{"prompt": "' + b"w1 " * 10_000 + b'"}'

    async def chunks() -> Any:
        yield body

    content = body if declared else chunks()
    headers = {"Content-Type": "application/json"}
    check(await http.post("/v1/completions", content=content, headers=headers), 413, None)
    assert not engine.taken


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"), [("error", 500), ("abort", 503), (RuntimeError("secret"), 500)]
)
async def test_failure_before_the_first_token(
    http: httpx.AsyncClient, engine: ScriptedClient, stream: bool, failure: Exception | str, status: int
) -> None:
    engine.fail_after, engine.failure = 0, failure
    response = await http.post("/v1/completions", json={**BASE, "stream": stream})
    error = check(response, status, None)
    assert "secret" not in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)


async def test_failure_in_mid_stream(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.fail_after = 2
    response = await http.post("/v1/completions", json={**BASE, "stream": True})
    assert response.status_code == 200
    *tokens, error, done, rest = response.text.split("\n\n")
    assert len(tokens) == 2
    assert error.startswith('data: {"error":{"message":')
    assert (done, rest) == ("data: [DONE]", "")


@pytest.mark.parametrize(
    ("failure", "traced"), [("error", False), ("abort", False), (RuntimeError("secret"), True)]
)
async def test_only_the_unforeseen_leaves_a_traceback(
    http: httpx.AsyncClient,
    engine: ScriptedClient,
    caplog: pytest.LogCaptureFixture,
    failure: Exception | str,
    traced: bool,
) -> None:
    engine.fail_after, engine.failure = 2, failure
    response = await http.post("/v1/completions", json={**BASE, "stream": True})
    assert '"error"' in response.text
    [record] = [record for record in caplog.records if "mid-stream" in record.message]
    assert bool(record.exc_info) == traced


async def test_one_failed_prompt_ends_the_others(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.fail_after, engine.delay = 1, 0.01
    response = await http.post("/v1/completions", json={**BASE, "prompt": ["w1", "w2", "w3"]})
    check(response, 500, None)
    assert len(engine.closed) == len(engine.taken) == 3


@pytest.mark.parametrize("state", ["draining", "stopped", "dead"])
async def test_not_ready(http: httpx.AsyncClient, engine: ScriptedClient, state: str) -> None:
    assert (await http.get("/health")).json() == {"status": "ready"}
    engine.state = state
    health = await http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": state})
    response = await http.post("/v1/completions", json=BASE)
    assert check(response, 503, None)["code"] == state
    assert int(response.headers["retry-after"]) > 0


def test_while_loading(settings: Settings) -> None:
    with running(None, settings) as url:
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert httpx.post(f"{url}/v1/completions", json=BASE).status_code == 503
        assert httpx.get(f"{url}/v1/models").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 200


async def test_crash_is_logged(
    http: httpx.AsyncClient, engine: ScriptedClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after, engine.failure = 0, RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        await http.post("/v1/completions", json=BASE)
        await until(lambda: "secret" in caplog.text)
