"""POST /v1/completions against a scripted engine: forms of prompts, JSON and SSE, what is reported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.server.scripted import ScriptedClient

PROMPT = " ".join(f"w{i}" for i in range(100))


def sse(text: str) -> list[Any]:
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    data = [event.removeprefix("data: ") for event in events]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


async def post(http: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": "words", **body}, headers=headers)


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [("w1 w2", [2]), (["w1", "w1 w2 w3"], [1, 3]), ([5, 6, 7], [3]), ([[5], [6, 7]], [1, 2])],
)
async def test_every_form_of_prompt(
    http: httpx.AsyncClient, engine: ScriptedClient, prompt: Any, lengths: list[int]
) -> None:
    answer = (await post(http, prompt=prompt, max_tokens=2, n=2)).json()
    assert sorted(len(r.prompt_token_ids) for r in engine.taken) == sorted(lengths)
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(lengths)))
    assert {c["text"] for c in answer["choices"]} == {" w1 w2"}
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(lengths)
    assert usage["completion_tokens"] == 4 * len(lengths)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": sum(min(16, n - 1) for n in lengths)}


async def test_answer_says_what_was_kept(http: httpx.AsyncClient) -> None:
    response = await post(http, prompt=PROMPT, kv={"policy": "curdkv", "budget": "50%"}, n=2)
    assert response.headers["x-kv-policy"] == "curdkv"
    assert response.headers["x-kv-budget-tokens"] == "50"
    kv = response.json()["usage"]["kv"]
    assert kv["policy"] == "curdkv"
    assert kv["kept_tokens"] == kv["evicted_tokens"] == kv["budget_tokens"] == 50
    assert kv["kept_ratio"] == 0.5
    assert (kv["bytes"], kv["peak_bytes"], kv["decode_evictions"]) == (2000, 4000, 2)


async def test_header_wins_over_body_wins_over_default(
    http: httpx.AsyncClient, engine: ScriptedClient
) -> None:
    body = {"policy": "knorm", "budget": "25%", "sink_tokens": 2}
    await post(http, {"X-KV-Policy": "curdkv", "X-KV-Budget": "50%"}, prompt=PROMPT, kv=body)
    options = engine.taken[0].eviction
    assert (options.policy, options.budget.value, options.sink_tokens) == ("curdkv", 0.5, 2)


async def test_stream_carries_the_same_as_the_whole_answer(http: httpx.AsyncClient) -> None:
    body = {"prompt": [[1, 2], [3]], "max_tokens": 3, "n": 2, "logprobs": 1, "return_token_ids": True}
    whole = (await post(http, **body)).json()
    response = await post(http, **body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-kv-policy"] == "full"
    *chunks, last = sse(response.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(p["text"] for p in pieces) == choice["text"]
        assert joined(p["token_ids"] for p in pieces) == choice["token_ids"] == [1, 2, 3]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert joined(p["logprobs"][key] for p in pieces) == choice["logprobs"][key]
        assert [p["prompt_token_ids"] for p in pieces] == [choice["prompt_token_ids"], None, None]
        assert [p["finish_reason"] for p in pieces] == [None, None, "length"]


async def test_stream_without_usage_has_no_usage_field(http: httpx.AsyncClient) -> None:
    chunks = sse((await post(http, prompt="w1", stream=True, max_tokens=2)).text)
    assert len(chunks) == 2
    assert all("usage" not in chunk for chunk in chunks)


async def test_logprobs(http: httpx.AsyncClient) -> None:
    logprobs = (await post(http, prompt="w1", max_tokens=2, logprobs=2)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["w1", "w2"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"w1": -0.5, "w2": -1.5}, {"w2": -0.5, "w3": -1.5}],
        "text_offset": [0, 2],
    }
    chosen_only = (await post(http, prompt="w1", max_tokens=1, logprobs=0)).json()["choices"][0]["logprobs"]
    assert chosen_only["tokens"] == ["w1"] and chosen_only["top_logprobs"] is None


@pytest.mark.parametrize("prompt", ["w5  w6", [5, 6]])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs(http: httpx.AsyncClient, prompt: Any, max_tokens: int) -> None:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    choice = (await post(http, **fields)).json()["choices"][0]
    assert choice["text"] == ("w5  w6" if isinstance(prompt, str) else "w5 w6") + " w1" * max_tokens
    assert choice["logprobs"] == {
        "tokens": ["w5", "w6", "w1"][: 2 + max_tokens],
        "token_logprobs": [None, -2.0, -0.5][: 2 + max_tokens],
        "top_logprobs": [None, {"w9": -0.1, "w6": -2.0}, {"w1": -0.5}][: 2 + max_tokens],
        "text_offset": [0, 2, 4][: 2 + max_tokens],
    }
    [piece] = [c for chunk in sse((await post(http, stream=True, **fields)).text) for c in chunk["choices"]]
    assert piece["text"] == choice["text"] and piece["logprobs"] == choice["logprobs"]


async def test_echo_without_logprobs_judges_nothing(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    choices = (await post(http, prompt=["w5", "w6"], max_tokens=1, echo=True, n=2)).json()["choices"]
    assert [c["text"] for c in choices] == ["w5 w1", "w5 w1", "w6 w1", "w6 w1"]
    assert engine.taken[0].sampling.prompt_logprobs is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("field", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json", {"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            ("json", SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", ["a", "b"])),
        ({"guided_json": '{"type": "object"}'}, ("json", '{"type": "object"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a"]}, ("choice", ["a"])),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_structure_reaches_the_engine(
    http: httpx.AsyncClient, engine: ScriptedClient, path: str, field: dict[str, Any], structure: Any
) -> None:
    prompt = {"prompt": "w1"} if path == "completions" else {"messages": [{"role": "user", "content": "w1"}]}
    assert (await http.post(f"/v1/{path}", json={**prompt, **field})).status_code == 200
    asked = engine.taken[0].sampling.structure
    assert (asked and (asked.kind, asked.source)) == structure


async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": -3, "min_tokens": 1}
    stops = {"stop": "w9", "stop_token_ids": [4], "ignore_eos": True}
    penalties = {"presence_penalty": 1, "frequency_penalty": -1.5, "repetition_penalty": 1.1}
    response = await post(
        http, prompt="w1", priority=-2, logit_bias={"7": -100}, **fields, **stops, **penalties
    )
    assert response.status_code == 200
    request = engine.taken[0]
    sampling = request.sampling
    assert request.priority == -2 and sampling.max_tokens == 16
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.seed, sampling.stop, sampling.stop_token_ids) == (-3, ("w9",), (4,))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        1,
        -1.5,
        1.1,
    )
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.logit_bias) == (1, True, {7: -100})


async def test_null_means_default(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    fields = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
        "kv",
        "stream",
    )
    response = await post(http, prompt="w1", **dict.fromkeys(fields))
    assert response.status_code == 200
    sampling = engine.taken[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.n) == (None, 1.0, 1.0, 1)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("wings", 2, True),
        ("wings", None, False),
        ("temprature", 0, True),
        ("use_beam_search", True, True),
        ("use_beam_search", False, False),
        ("mirostat", 2, True),
        ("metadata", {"a": "b"}, False),
        ("service_tier", "auto", False),
    ],
)
async def test_fields_that_are_not_done(
    http: httpx.AsyncClient, engine: ScriptedClient, name: str, value: Any, refused: bool
) -> None:
    response = await post(http, prompt="w1", **{name: value})
    assert response.status_code == (400 if refused else 200), response.text
    if refused:
        assert response.json()["error"]["param"] == name
        assert not engine.taken


async def test_a_field_that_is_misspelt(http: httpx.AsyncClient) -> None:
    response = await post(http, prompt="w1", temprature=0)
    assert "'temperature'" in response.json()["error"]["message"]


async def test_openai_client(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["words"]
        extra = {"kv": {"policy": "curdkv", "budget": 0.25}}
        answer = await client.completions.create(model="words", prompt=PROMPT, max_tokens=3, extra_body=extra)
        assert answer.choices[0].text == " w1 w2 w3"
        assert answer.usage.kv["budget_tokens"] == 25
        stream = await client.completions.create(
            model="words",
            prompt=PROMPT,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-KV-Policy": "streaming-llm", "X-KV-Budget": "40tok"},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == " w1 w2 w3"
    assert chunks[-1].usage.kv["budget_tokens"] == 40
