"""Conversations: templates, where the context ends, answers and streams as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from curkv.server.chat.conversation import tokenize
from curkv.server.chat.protocol import Message, Rendering
from curkv.server.tokenizing import Reader
from tests.server.scripted import ScriptedClient

USER = {"role": "user", "content": "w10 w11"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


async def chat(http: httpx.AsyncClient, *messages: Any, **fields: Any) -> httpx.Response:
    body = {"messages": list(messages) or [USER], "max_completion_tokens": 3, **fields}
    return await http.post("/v1/chat/completions", json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_answer(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    response = await chat(http, {"role": "system", "content": "w9"}, USER, n=2)
    assert engine.taken[0].prompt_token_ids == [2, 9, 1, 10, 11, 3]
    assert engine.taken[0].sampling.max_tokens == 3
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    assert answer.id.startswith("chatcmpl-") and answer.model == "words"
    assert [c.index for c in answer.choices] == [0, 1]
    assert [c.message.content for c in answer.choices] == [" w1 w2 w3"] * 2
    assert [c.finish_reason for c in answer.choices] == ["length"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6)
    assert answer.usage.kv["policy"] == "full"
    assert response.headers["x-kv-policy"] == "full"


async def test_stream(http: httpx.AsyncClient) -> None:
    response = await chat(http, n=2, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    for chunk in (*chunks, last):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    for index in range(2):
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [p["delta"].get("role") for p in pieces] == ["assistant", None, None]
        assert "".join(p["delta"]["content"] for p in pieces) == " w1 w2 w3"
        assert [p["finish_reason"] for p in pieces] == [None, None, "length"]


async def test_stream_without_usage_has_no_usage_field(http: httpx.AsyncClient) -> None:
    assert all("usage" not in chunk for chunk in events(await chat(http, stream=True)))


async def test_logprobs(http: httpx.AsyncClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 1, "return_token_ids": True}
    whole = (await chat(http, **fields)).json()
    expected = {
        "token": "w1",
        "logprob": -0.5,
        "bytes": [119, 49],
        "top_logprobs": [
            {"token": "w1", "logprob": -0.5, "bytes": [119, 49]},
            {"token": "w2", "logprob": -1.5, "bytes": [119, 50]},
        ],
    }
    assert whole["choices"][0]["logprobs"] == {"content": [expected], "refusal": None}
    assert (whole["choices"][0]["token_ids"], whole["prompt_token_ids"]) == ([1], [1, 10, 11, 3])
    (chunk,) = events(await chat(http, stream=True, **fields))
    assert chunk["choices"][0]["logprobs"]["content"] == [expected]
    assert (chunk["choices"][0]["token_ids"], chunk["prompt_token_ids"]) == ([1], [1, 10, 11, 3])


async def test_content_parts_names_and_template_variables(
    http: httpx.AsyncClient, engine: ScriptedClient
) -> None:
    parts = [{"type": "text", "text": "w10"}, {"type": "text", "text": "w11"}]
    message = {"role": "user", "content": parts, "name": "w99"}
    assert (await chat(http, message, chat_template_kwargs={"extra": "w5"})).status_code == 200
    assert engine.taken[0].prompt_token_ids == [1, 10, 11, 99, 3, 5]


EPHEMERAL = {"type": "ephemeral"}


@pytest.mark.parametrize(
    ("messages", "context_tokens"),
    [
        ([USER], None),
        ([{**USER, "cache_control": EPHEMERAL}], 3),
        ([{"role": "system", "content": "w9", "cache_control": EPHEMERAL}, USER], 2),
        ([{"role": "system", "content": "w9", "cache_control": EPHEMERAL}, USER | {"name": "w8"}], 2),
        ([{"role": "user", "content": "  w10 \n ", "cache_control": EPHEMERAL}, USER], 2),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "w10 w11", "cache_control": EPHEMERAL},
                        {"type": "text", "text": "w12"},
                    ],
                }
            ],
            3,
        ),
        (
            [
                {"role": "system", "content": "w9", "cache_control": EPHEMERAL},
                {"role": "user", "content": [{"type": "text", "text": "w10"}], "cache_control": EPHEMERAL},
                USER,
            ],
            4,
        ),
    ],
)
def test_the_last_mark_ends_the_context(messages: list[dict[str, Any]], context_tokens: int | None) -> None:
    client = ScriptedClient()
    (prompt,) = tokenize([Message.model_validate(m) for m in messages], Rendering(), client, Reader(client))
    assert prompt.context_tokens == context_tokens


SYSTEM = {"role": "system", "content": "w9"}


@pytest.mark.parametrize(
    ("messages", "tools", "frame"),
    [([USER], [], 1), ([SYSTEM, USER], [], 1), ([{**USER, "content": ""}], [], 1), ([USER], [TOOL], 0)],
    ids=["a user's message", "a system message", "an empty message", "tools come first"],
)
def test_the_frame_ends_where_the_client_has_its_say(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], frame: int
) -> None:
    client, rendering = ScriptedClient(), Rendering(tools=tools)
    (prompt,) = tokenize([Message.model_validate(m) for m in messages], rendering, client, Reader(client))
    assert prompt.frame_tokens == frame


async def test_the_engine_is_told_of_a_conversation_s_frame_and_of_none_in_a_text(
    http: httpx.AsyncClient, engine: ScriptedClient
) -> None:
    await chat(http)
    await http.post("/v1/completions", json={"prompt": "w1 w10 w11 w3", "max_tokens": 1})
    assert engine.taken[0].prompt_token_ids == engine.taken[1].prompt_token_ids
    assert [request.frame_tokens for request in engine.taken] == [1, 0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "w1"}, "messages"),
        ({"messages": [{"role": "poet", "content": "w1"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": {}, "text": ""}]}]}, "messages"),
        ({"messages": [USER | {"cache_control": {"type": "forever"}}]}, "messages"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "guided_regex": "a+"}, "guided_regex"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages"),
        ({"chat_template_kwargs": {"refuse": True}}, "messages"),
        ({"kv": {"policy": "curdkv", "budget": 0}}, "kv.budget"),
    ],
)
async def test_bad_field(
    http: httpx.AsyncClient, engine: ScriptedClient, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/chat/completions", json={"messages": [USER], **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.taken


async def test_lone_surrogate(http: httpx.AsyncClient) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = await http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


async def test_tools_that_may_not_be_called_are_ignored(http: httpx.AsyncClient) -> None:
    assert (await chat(http, tools=[TOOL], tool_choice="none")).status_code == 200


async def test_a_model_without_chat_template(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.chat_template = None
    response = await chat(http)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


async def test_openai_client(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True) as client:
        fields: dict[str, Any] = {"model": "words", "messages": [USER], "max_completion_tokens": 3}
        answer = await client.chat.completions.create(**fields)
        assert answer.choices[0].message.content == " w1 w2 w3"
        stream = await client.chat.completions.create(**fields, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == " w1 w2 w3"
