"""The server over the default model, through the `openai` client and plain HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError

from curkv.config import Settings
from curkv.engine.client import EngineClient
from curkv.engine.stats import StepStats
from curkv.server.run import build_client
from tests.server.scripted import running, until

NAME = "smollm2"
FACT = "The code of the vault is 4711. "
QUESTION = FACT + "Rivers carry rain from the hills to the sea. " * 30 + "The code of the vault is"
CONTEXT = 1024


@pytest.fixture(scope="module")
def settings(default_model_dir: Path) -> Settings:
    return Settings(
        model=str(default_model_dir),
        served_model_name=NAME,
        kv_cache_memory=48 << 20,
        max_model_len=CONTEXT,
        max_step_tokens=128,
        prefix_cache_memory=32 << 20,
    )


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Iterator[EngineClient]:
    client = build_client(settings)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def url(engine: EngineClient, settings: Settings) -> Iterator[str]:
    with running(engine, settings) as url:
        yield url


@pytest.fixture
async def openai(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        yield client


async def until_idle(engine: EngineClient) -> None:
    await until(
        lambda: engine.stats.running == engine.stats.waiting == engine.stats.used_pages == 0, seconds=60
    )


async def test_every_example_of_the_openapi_document_works(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    tried = 0
    for path, methods in paths.items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            response = await http.post(path, json=example["value"])
            assert response.status_code == 200, (path, example, response.text)
            tried += 1
    assert tried == 11


async def test_what_the_server_suggests_at_its_start_is_answered_from_a_quarter_of_the_cache(
    openai: AsyncOpenAI, engine: EngineClient
) -> None:
    prompt = FACT + "Rivers carry rain from the hills to the sea. " * 90 + "The code of the vault is"
    headers = {"X-KV-Policy": "auto", "X-KV-Budget": "25%"}
    answer = await openai.completions.create(
        model=NAME, prompt=prompt, max_tokens=6, temperature=0, extra_headers=headers
    )
    assert "4711" in answer.choices[0].text
    assert answer.usage.kv["kept_tokens"] == answer.usage.prompt_tokens // 4
    await until_idle(engine)


async def test_answers_and_what_they_keep(openai: AsyncOpenAI, engine: EngineClient) -> None:
    kept = {}
    for policy, budget in (("full", None), ("curdkv", "50%"), ("curdkv", "25%"), ("adacurdkv", "25%")):
        headers = {"X-KV-Policy": policy, **({"X-KV-Budget": budget} if budget else {})}
        raw = await openai.completions.with_raw_response.create(
            model=NAME, prompt=QUESTION, max_tokens=6, temperature=0, extra_headers=headers
        )
        answer = raw.parse()
        assert raw.headers["x-kv-policy"] == answer.usage.kv["policy"] == policy
        assert int(raw.headers["x-kv-budget-tokens"]) == answer.usage.kv["budget_tokens"]
        kept[policy, budget] = answer.usage.kv
        if policy == "full":
            assert "4711" in answer.choices[0].text
    prompt_tokens = answer.usage.prompt_tokens
    for (_, budget), kv in kept.items():
        ratio = float(budget.rstrip("%")) / 100 if budget else 1.0
        assert kv["kept_tokens"] == int(prompt_tokens * ratio)
        assert kv["kept_tokens"] + kv["evicted_tokens"] == prompt_tokens
        assert kv["kept_ratio"] == pytest.approx(kv["kept_tokens"] / prompt_tokens, abs=1e-5)
    assert kept["curdkv", "25%"]["bytes"] < kept["curdkv", "50%"]["bytes"] < kept["full", None]["bytes"]
    await until_idle(engine)


async def test_stream_equals_json(openai: AsyncOpenAI) -> None:
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": ["The sea is", "Once upon"],
        "max_tokens": 6,
        "seed": 1,
        "n": 2,
    }
    whole = await openai.completions.create(**body)
    texts = dict.fromkeys(range(4), "")
    stream = await openai.completions.create(**body, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


async def test_token_ids_and_logprobs(openai: AsyncOpenAI, engine: EngineClient) -> None:
    ids = engine.tokenizer.encode("The capital of France is").ids
    answer = await openai.completions.create(
        model=NAME, prompt=ids, max_tokens=3, temperature=0, logprobs=2, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    assert choice.prompt_token_ids == ids
    assert engine.tokenizer.decode(choice.token_ids) == choice.text == "".join(choice.logprobs.tokens)
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2 and top[token] == logprob == max(top.values()) <= 0


BAD_INPUT: list[tuple[dict[str, Any], dict[str, str], int, str | None]] = [
    ({"kv": {"policy": "no-such"}}, {}, 400, "kv.policy"),
    ({}, {"X-KV-Policy": "no-such"}, 400, "X-KV-Policy"),
    *(
        ({}, {"X-KV-Policy": "curdkv", "X-KV-Budget": budget}, 400, "X-KV-Budget")
        for budget in ("0", "-1", "101%", "abc", "1e999")
    ),
    ({}, {"X-KV-Policy": "curdkv", "X-KV-Budget": "50%", "X-KV-Protect": "0-900"}, 400, "X-KV-Protect"),
    ({"max_tokens": CONTEXT}, {}, 400, "max_tokens"),
    ({"prompt": "word " * CONTEXT}, {}, 400, "prompt"),
    ({"prompt": ""}, {}, 400, "prompt"),
    ({"prompt": []}, {}, 400, "prompt"),
    ({"prompt": {}}, {}, 400, "prompt"),
    ({"prompt": [49152]}, {}, 400, "prompt"),
    ({"prompt": [-1]}, {}, 400, "prompt"),
    ({"prompt": ["good", ""]}, {}, 400, "prompt"),
    ({"prompt": [[1], [10**20]]}, {}, 400, "prompt"),
    ({"max_tokens": "many"}, {}, 400, "max_tokens"),
    ({"logit_bias": {"49152": 1}}, {}, 400, "logit_bias"),
    ({"stop_token_ids": [49152], "min_tokens": 1}, {}, 400, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, {}, 400, "stop_token_ids"),
    ({"model": "gpt-5"}, {}, 404, "model"),
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_the_default_model_makes_valid_calls(openai: AsyncOpenAI, choice: Any) -> None:
    place = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}},
        "required": ["city"],
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": place}}
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [tool],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_completion_tokens": 100,
    }
    answer = (await openai.chat.completions.create(**asked)).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}

    stream = await openai.chat.completions.create(**asked, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert pieces[0].id and pieces[0].function.name == "get_weather" and len(pieces) > 3
    assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments
    assert not any(delta.content for delta in deltas)

    asked["messages"] += [
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    later = await openai.chat.completions.create(**{**asked, "tool_choice": "auto"})
    assert later.choices[0].finish_reason in ("stop", "tool_calls", "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "headers", "status", "param"), BAD_INPUT)
async def test_bad_input_takes_no_page(
    http: httpx.AsyncClient,
    engine: EngineClient,
    change: dict[str, Any],
    headers: dict[str, str],
    status: int,
    param: str | None,
    stream: bool,
) -> None:
    await until_idle(engine)
    before = engine.stats
    body = {"prompt": "Hello there", "max_tokens": 4, "stream": stream, **change}
    response = await http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param, response.text
    assert engine.stats is before


async def test_request_that_can_never_fit_the_pool(settings: Settings) -> None:
    small = settings.model_copy(
        update={"engine": settings.engine.model_copy(update={"kv_cache_memory": 8 << 20})}
    )
    engine = build_client(small)
    try:
        with running(engine, small) as url:
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai:
                with pytest.raises(BadRequestError, match="pages of KV cache"):
                    await openai.completions.create(model=NAME, prompt=QUESTION, max_tokens=400)
        assert engine.stats.used_pages == 0
    finally:
        engine.stop()


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_frees_every_page(
    http: httpx.AsyncClient, engine: EngineClient, stream: bool
) -> None:
    body = {"prompt": [QUESTION, "The sea"], "max_tokens": 500, "n": 2, "ignore_eos": True, "stream": stream}
    request = asyncio.create_task(http.post("/v1/completions", json=body))
    await until(lambda: engine.stats.used_pages > 0, seconds=60)
    request.cancel()
    await until_idle(engine)


async def test_disconnect_while_streaming(http: httpx.AsyncClient, engine: EngineClient) -> None:
    body = {"prompt": "The sea", "max_tokens": 900, "ignore_eos": True, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            assert json.loads(line.removeprefix("data: "))["choices"]
            break
    await until_idle(engine)


async def test_metrics_count_what_was_evicted_and_return_to_zero(
    http: httpx.AsyncClient, engine: EngineClient
) -> None:
    body = {"prompt": QUESTION, "max_tokens": 1, "kv": {"policy": "knorm", "budget": "50%"}}
    kv = (await http.post("/v1/completions", json=body)).json()["usage"]["kv"]
    labels = f'{{model_name="{NAME}",phase="prefill",policy="knorm"}}'
    evicted = kv["evicted_tokens"] * engine.cache_layout.num_heads
    expected = [f"curkv:kv_tokens_evicted_total{labels} {evicted}"]
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_used_bytes",
        "kv_cache_usage_ratio",
    ):
        expected.append(f'curkv:{name}{{model_name="{NAME}"}} 0.0')
    async with asyncio.timeout(10):
        while missing := set(expected) - set((await http.get("/metrics")).text.splitlines()):
            await asyncio.sleep(0.05)
    assert not missing


async def test_a_repeated_prompt_is_found_until_prefixes_are_dropped(
    http: httpx.AsyncClient, engine: EngineClient
) -> None:
    texts, cached = [], []
    body = {"prompt": "It was a fine day. " + QUESTION, "max_tokens": 4, "temperature": 0}
    await http.delete("/v1/kv/prefixes")
    for drops in (False, False, True):
        if drops:
            held = engine.stats.prefix_bytes
            assert held > 0
            assert (await http.delete("/v1/kv/prefixes")).json() == {"freed_bytes": held}
        answer = (await http.post("/v1/completions", json=body)).json()
        texts.append(answer["choices"][0]["text"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, answer["usage"]["prompt_tokens"] - 2, 0]
    assert len(set(texts)) == 1
    async with asyncio.timeout(10):
        while (
            f'curkv:prefix_cache_hits_total{{model_name="{NAME}"}} 0.0' in (await http.get("/metrics")).text
        ):
            await asyncio.sleep(0.05)


async def test_a_conversation_goes_on_from_what_it_held(openai: AsyncOpenAI, http: httpx.AsyncClient) -> None:
    messages, computed, held = [{"role": "user", "content": QUESTION}], [], []
    for turn in range(4):
        answer = await openai.chat.completions.create(
            model=NAME, messages=messages, max_tokens=8, temperature=0,
            extra_body={"kv": {"policy": "snapkv", "budget": "100", "session": "talk"}},
        )  # fmt: skip
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens or 0
        computed.append(answer.usage.prompt_tokens - cached)
        held.append(answer.usage.model_extra["kv"]["kept_tokens"])
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": f"And what is {turn} plus {turn}?"},
        ]
    assert computed[0] > 300 and max(computed[1:]) < 60 and max(held) <= 100
    [session] = (await http.get("/v1/kv/sessions")).json()["data"]
    assert (session["id"], session["policy"], session["answers"]) == ("talk", "snapkv", 4)
    assert (await http.delete("/v1/kv/sessions/talk")).json()["freed_bytes"] > 0
    assert (await http.delete("/v1/kv/sessions/talk")).status_code == 404
    assert (await http.get("/v1/kv/sessions")).json() == {"data": []}


async def test_a_client_that_goes_away_while_prefixes_are_dropped_leaves_the_engine_running(
    engine: EngineClient,
) -> None:
    busy = threading.Event()
    engine._submit(lambda: busy.wait() and None)
    dropping = asyncio.create_task(engine.drop_prefixes())
    await asyncio.sleep(0)
    dropping.cancel()
    await asyncio.gather(dropping, return_exceptions=True)
    busy.set()
    async with asyncio.timeout(10):
        assert await engine.drop_prefixes() >= 0


async def test_statistics_that_cannot_be_taken_end_no_request(
    engine: EngineClient, http: httpx.AsyncClient
) -> None:
    def fail_once(stats: StepStats) -> None:
        engine._sinks.remove(fail_once)
        raise ValueError("no such counter")

    engine.add_sink(fail_once)
    answer = await http.post("/v1/completions", json={"prompt": "A", "max_tokens": 3, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 3 and fail_once not in engine._sinks
