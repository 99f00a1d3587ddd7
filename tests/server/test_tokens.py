"""Tokens of prompts and texts of tokens."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.scripted import MAX_MODEL_LEN, ScriptedClient

USER = {"role": "user", "content": "w10"}


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ({"prompt": "w5 w6"}, [5, 6]),
        ({"prompt": [5, 6]}, [5, 6]),
        ({"prompt": ""}, []),
        ({"messages": [USER]}, [1, 10, 3]),
        ({"messages": [USER], "chat_template_kwargs": {"extra": "w7"}}, [1, 10, 3, 7]),
    ],
)
async def test_tokenize(http: httpx.AsyncClient, body: dict[str, Any], ids: list[int]) -> None:
    answer = (await http.post("/tokenize", json=body)).json()
    expected = {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    assert answer == expected
    named = (await http.post("/tokenize", json={**body, "return_token_strs": True})).json()
    assert named["token_strs"] == [f"w{i}" for i in ids]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"extra": "w7"}, "temperature": 0, "max_tokens": 3},
    ],
)
async def test_what_a_chat_sends_is_tokenized_as_the_chat_reads_it(
    http: httpx.AsyncClient, engine: ScriptedClient, fields: dict[str, Any]
) -> None:
    body = {"messages": [USER, {"role": "assistant", "content": "w11"}], **fields}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    counted = (await http.post("/tokenize", json=body)).json()
    assert counted["tokens"] == engine.taken[0].prompt_token_ids


async def test_detokenize(http: httpx.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": [5, 6]})).json() == {"prompt": "w5 w6"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "w1", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [USER], "tool": []}, "tool"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [USER], "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ("/detokenize", {"tokens": [1000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "w1"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_bad_field(http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model(http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json={"model": "gpt-5", "prompt": "w1", "tokens": [1]})
    assert response.status_code == 404


async def test_models_and_version(http: httpx.AsyncClient) -> None:
    card = (await http.get("/v1/models/words")).json()
    assert (await http.get("/v1/models")).json()["data"] == [card]
    for other in ("gpt-5", "org/model"):
        missing = await http.get(f"/v1/models/{other}")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert (await http.get("/version")).json()["version"]


@pytest.mark.parametrize("ids", [[4294967296], [-1], [5, 1000]])
async def test_ids_outside_the_vocabulary_are_named(http: httpx.AsyncClient, ids: list[int]) -> None:
    for wanted in (False, True):
        body = {"prompt": ids, "return_token_strs": wanted}
        response = await http.post("/tokenize", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
