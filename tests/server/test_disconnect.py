"""A client that goes away takes its requests with it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.server.scripted import ScriptedClient, until


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay", [0.05, 30.0])
async def test_disconnect_closes_every_prompt(
    http: httpx.AsyncClient, engine: ScriptedClient, stream: bool, delay: float
) -> None:
    engine.delay = delay
    body = {"prompt": ["w1", "w2"], "max_tokens": 200, "stream": stream}
    request = asyncio.create_task(http.post("/v1/completions", json=body))
    await until(lambda: len(engine.taken) == 2)
    await asyncio.sleep(0.2)
    assert not engine.closed
    request.cancel()
    await until(lambda: len(engine.closed) == 2)


async def test_disconnect_in_mid_stream(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.delay = 0.01
    body = {"prompt": "w1", "max_tokens": 200, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            assert line.startswith("data: ")
            break
    await until(lambda: len(engine.closed) == 1)


async def test_tokens_arrive_one_by_one(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.delay = 0.05
    loop, arrivals = asyncio.get_running_loop(), []
    body = {"prompt": "w1", "max_tokens": 5, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line:
                arrivals.append(loop.time())
    assert arrivals[4] - arrivals[0] > 0.15
