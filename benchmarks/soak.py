"""Mixed requests, many of which are abandoned: afterwards nothing may be held any more.

    .venv/bin/curkv serve --port 8010 --kv-cache-memory 600MiB &
    .venv/bin/python benchmarks/soak.py --url http://127.0.0.1:8010 --requests 1000 --disconnects 0.3

Prints what was sent and answered. Fails unless running, waiting, used bytes and, once they are dropped, bytes
held for repeated prompts are 0 at the end, and the server's resident memory grew by less than `--growth`
after the first tenth of the requests.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Annotated, Any

import httpx
import typer

from curkv.bench.process import wait_for
from curkv.bench.script import script

SENTENCE = "Rivers carry rain from the hills to the sea. "
POLICIES: tuple[dict[str, str], ...] = (
    {"policy": "full"},
    {"policy": "curdkv", "budget": "25%"},
    {"policy": "snapkv", "budget": "50%"},
    {"policy": "adacurdkv", "budget": "64tok"},
    {"policy": "streaming-llm", "budget": "50%", "decode_budget": "128tok"},
)
BAD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/kv/explain", {"prompt": "x", "policies": [{"policy": "no-such"}]}),
)
ZERO_AT_THE_END = (
    "curkv:num_requests_running",
    "curkv:num_requests_waiting",
    "curkv:kv_cache_used_bytes",
    "curkv:prefix_cache_held_bytes",
)


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of a random request: one in ten is bad."""
    if rng.random() < 0.1:
        return rng.choice(BAD)
    text = SENTENCE * rng.randint(10, 40)
    kv = rng.choice(POLICIES)
    body: dict[str, Any] = {"kv": kv, "max_tokens": rng.randint(1, 24), "stream": rng.random() < 0.5}
    kind = rng.random()
    if kind < 0.45:
        prompt = [text, SENTENCE * 12] if rng.random() < 0.2 else text
        return "/v1/completions", {"prompt": prompt, "n": rng.choice([1, 1, 2]), **body}
    if kind < 0.55:
        return "/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, **body, "max_tokens": 0}
    if kind < 0.65:
        return "/v1/completions", {"prompt": text, "structured_outputs": {"regex": "[a-z]{1,12}"}, **body}
    if kind < 0.7:
        return "/v1/kv/explain", {"prompt": text, "policies": [kv]}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text + "Why?"}], **body}


async def send(http: httpx.AsyncClient, rng: random.Random, disconnects: float, seen: Counter[str]) -> None:
    """Sends one request, and goes away before its end if chance says so."""
    path, body = draw(rng)
    patience = rng.uniform(0.0, 1.5) if rng.random() < disconnects else None
    try:
        async with asyncio.timeout(patience):
            response = await http.post(path, json=body)
            broken = response.status_code == 200 and 'data: {"error"' in response.text
            seen["error in a stream" if broken else str(response.status_code)] += 1
    except TimeoutError:
        seen["abandoned"] += 1


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The gauges that have to return to zero, and the server's memory."""
    lines = (await http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith((*ZERO_AT_THE_END, "process_resident")))
    return {name.split("{")[0]: float(value) for name, value in pairs}


async def soak(url: str, requests: int, users: int, disconnects: float, growth: float, seed: int) -> bool:
    """Runs everything; says whether nothing is left."""
    seen = Counter[str]()
    room = asyncio.Semaphore(users)
    memory: list[float] = []
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits()) as http:

        async def one(index: int) -> None:
            async with room:
                await send(http, random.Random(seed * 10**6 + index), disconnects, seen)
                if (done := sum(seen.values())) % max(1, requests // 10) == 0:
                    memory.append((await metrics(http))["process_resident_memory_bytes"])
                    print(f"{done} done, {memory[-1] / 2**20:.0f} MiB resident", flush=True)

        await asyncio.gather(*(one(index) for index in range(requests)))
        for _ in range(600):
            await http.delete("/v1/kv/prefixes")
            left = await metrics(http)
            memory.append(left.pop("process_resident_memory_bytes"))
            if not any(left.values()):
                break
            await asyncio.sleep(0.1)
    grown = (memory[-1] - memory[0]) / 2**20
    print(f"{requests} requests in {time.monotonic() - started:.0f} s: {dict(seen)}")
    print(f"left: {left}; memory grew by {grown:.0f} MiB after the first tenth")
    failed = any(int(status) >= 500 for status in seen if status.isdigit()) or seen["error in a stream"]
    nothing_left = len(left) == len(ZERO_AT_THE_END) and not any(left.values())
    return nothing_left and grown < growth and not failed


def main(
    url: str = "http://127.0.0.1:8000",
    requests: int = 1000,
    users: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    disconnects: Annotated[float, typer.Option(help="Share that is abandoned.")] = 0.3,
    growth: Annotated[float, typer.Option(help="MiB that the server's memory may grow.")] = 100,
    seed: int = 0,
) -> None:
    """Ends with status 1 if something is left."""
    wait_for(f"{url}/health")
    if not asyncio.run(soak(url, requests, users, disconnects, growth, seed)):
        raise typer.Exit(1)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
