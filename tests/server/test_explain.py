"""The words of explanations; what is in them is tested with the engine."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedClient

PROMPT = "w5 w6 w7 w8"


async def ask(http: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await http.post("/v1/kv/explain", json={"prompt": PROMPT, **body}, headers=headers)


async def test_answer(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    policies = [{"policy": "curdkv", "budget": "50%"}, {"policy": "full"}]
    answer = (await ask(http, policies=policies, scores=True)).json()
    assert [options.policy for options in engine.taken[0].explain] == ["curdkv", "full"]
    assert engine.taken[0].sampling.max_tokens == 0
    assert (answer["object"], answer["num_layers"], answer["num_kv_heads"]) == ("kv.explanation", 2, 3)
    assert (answer["tokens"], answer["token_ids"]) == (["w5", "w6", "w7", "w8"], [5, 6, 7, 8])
    assert [found["policy"] for found in answer["policies"]] == ["curdkv", "full"]
    found = answer["policies"][0]
    assert found["kept"] == [[[[0, 2], [3, 4]], [[0, 2]], [[0, 2]]], [[[0, 2]]] * 3]
    assert found["mean"] == [1.0, 1.0, 0.0, 0.1667]
    assert found["kept_ratio"] == pytest.approx(13 / 24, abs=1e-6)
    assert base64.b64decode(found["scores"]) == bytes([7]) * 24
    assert (found["error"], found["head_errors"]) == (0.5, [[0.5] * 3] * 2)
    assert (found["bytes_full"], found["bytes_kept"]) == (900, 300)
    assert answer["usage"]["prompt_tokens"] == 4


async def test_one_policy_from_headers_or_kv(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    headers = {"X-KV-Policy": "knorm", "X-KV-Budget": "50%"}
    [found] = (await ask(http, headers)).json()["policies"]
    assert found["policy"] == "knorm" and found["scores"] is None
    [found] = (await ask(http, kv={"policy": "curdkv", "budget": "50%"})).json()["policies"]
    assert found["policy"] == "curdkv"


async def test_conversation(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    answer = await ask(http, prompt=None, messages=[{"role": "user", "content": "w9"}])
    assert answer.json()["token_ids"] == [1, 9, 3]


GOOD = {"policy": "curdkv", "budget": "50%"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "w1 " * 300}, "max_tokens"),
        ({"policies": []}, "policies"),
        ({"policies": [GOOD] * 17}, "policies"),
        ({"policies": [GOOD, {"policy": "no"}]}, "policies.1.policy"),
        ({"policies": [GOOD, {"policy": "curdkv"}]}, "policies.1.budget"),
        ({"policies": [{**GOOD, "protect": "0-9"}]}, "policies.0.protect"),
        ({"policies": [{**GOOD, "context_tokens": 2}]}, "policies.0.context_tokens"),
        ({"policies": [{**GOOD, "prefill": "streaming"}]}, "policies.0.prefill"),
        ({"kv": {**GOOD, "wings": 2}}, "kv.wings"),
    ],
)
async def test_bad_field(
    http: httpx.AsyncClient, engine: ScriptedClient, body: dict[str, Any], param: str
) -> None:
    response = await ask(http, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.taken


async def test_bad_header(http: httpx.AsyncClient) -> None:
    response = await ask(http, {"X-KV-Budget": "101%"}, policies=[{"policy": "curdkv"}])
    assert response.json()["error"]["param"] == "X-KV-Budget"


async def test_failure(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.state = "draining"
    assert (await ask(http)).status_code == 503
