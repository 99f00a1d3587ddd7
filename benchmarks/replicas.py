"""Two replicas on this machine, behind vllm-router or on Ray Serve: what a client sees of them.

    pip install vllm-router && python benchmarks/replicas.py vllm-router
    pip install 'curkv[ray]' && python benchmarks/replicas.py ray

Checks that a session stays on its replica and sessions use both, that headers and errors pass through, that
a client who goes away frees its memory, and that a replica that is killed costs only its own requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import psutil
import typer

from curkv.bench.process import cpu_seconds, curkv_serve, free_port, running, wait_for
from curkv.bench.script import script
from curkv.sse import DONE

SETTINGS = {"kv_cache_memory": "100MiB", "kv_policy": "curdkv", "kv_budget": "50%", "threads": "1"}
COMPOSE = Path(__file__).parents[1] / "docker" / "compose.replicas.yaml"
PROMPT = "The tide turned shortly after six, and two trawlers left the inner basin under a grey sky. " * 4


def main(behind: Annotated[Literal["vllm-router", "ray"], typer.Argument()]) -> None:
    """Starts the replicas, runs the checks in order, prints each."""
    start = {"vllm-router": behind_vllm_router, "ray": on_ray}[behind]
    with start() as fleet:
        asyncio.run(check(fleet))


@dataclass
class Fleet:
    """Two replicas and where they are reached.

    Attributes:
        url: what clients talk to.
        direct: URLs of the replicas themselves; empty if they have none (Ray), where the process that is busy
            tells them apart.
        processes: gives the replicas' process ids.
    """

    url: str
    direct: list[str]
    processes: Callable[[], list[int]]


@contextlib.contextmanager
def behind_vllm_router() -> Iterator[Fleet]:
    """Two `curkv serve` and `vllm-router` with consistent hashing, as in docker/compose.replicas.yaml."""
    environment = {**os.environ, **{f"CURKV_{name.upper()}": value for name, value in SETTINGS.items()}}
    with contextlib.ExitStack() as stack, open(os.devnull, "w") as quiet:
        replicas = [stack.enter_context(running(curkv_serve(), quiet, environment)) for _ in range(2)]
        urls = [url for url, _ in replicas]
        router = ["vllm-router", *router_options(), "--port", "{port}", "--worker-urls", *urls]
        metrics = ["--prometheus-port", str(free_port())]
        url, _ = stack.enter_context(running([*router, *metrics], quiet, environment))
        yield Fleet(url, urls, lambda: [process.pid for _, process in replicas])


def router_options() -> list[str]:
    """Options of vllm-router in docker/compose.replicas.yaml, but for the workers."""
    return re.findall(r"^ +- (--\S+=\S+)$", COMPOSE.read_text(), re.M)


@contextlib.contextmanager
def on_ray() -> Iterator[Fleet]:
    """`curkv.server.ray_app` with two replicas on a Ray cluster of this machine alone."""
    import ray
    from ray import serve

    from curkv.server.ray_app import app

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({**SETTINGS, "min_replicas": 2, "max_replicas": 2}))
        wait_for(f"http://127.0.0.1:{port}/health")
        yield Fleet(f"http://127.0.0.1:{port}", [], ray_replicas)
    finally:
        serve.shutdown()
        ray.shutdown()


def ray_replicas() -> list[int]:
    """Process ids of the replicas on Ray."""
    processes = psutil.process_iter(["cmdline"])
    return [p.pid for p in processes if " ".join(p.info["cmdline"] or ()).startswith("ray::ServeReplica:")]


async def check(fleet: Fleet) -> None:
    """Runs the checks against replicas that are ready."""
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        homes = await sessions_stick(fleet, client)
        await headers_pass_through(client)
        await errors_pass_through(client)
        await a_client_that_goes_away_frees_its_memory(fleet, client, homes)
        await a_killed_replica_costs_only_its_own_requests(fleet, client, homes)


async def sessions_stick(fleet: Fleet, client: httpx.AsyncClient) -> dict[str, str]:
    """Three requests in each of eight sessions; gives what identifies each session's replica."""
    homes: dict[str, str] = {}
    for turn in range(3):
        for session in (f"session-{number}" for number in range(8)):
            home = await replica_of(fleet, client, session)
            assert homes.setdefault(session, home) == home, f"{session} moved in turn {turn}"
    assert len(set(homes.values())) == 2, "all sessions are on one replica"
    counts = [list(homes.values()).count(home) for home in set(homes.values())]
    say(f"sessions stick: 8 sessions x 3 requests, {counts[0]} on one replica and {counts[1]} on the other")
    return homes


async def replica_of(fleet: Fleet, client: httpx.AsyncClient, session: str) -> str:
    """Sends one request and finds out which replica answered it: its URL, or the process that was busy."""
    before = {url: await answered(url) for url in fleet.direct}
    busy_before = {pid: cpu_seconds(pid) for pid in fleet.processes()}
    headers = {"X-Session-Id": session}
    answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers=headers)
    assert answer.status_code == 200, answer.text
    if fleet.direct:
        [home] = [url for url in fleet.direct if await answered(url) > before[url]]
        return home
    return str(max(busy_before, key=lambda pid: cpu_seconds(pid) - busy_before[pid]))


async def answered(url: str) -> float:
    """Choices that a replica has ended."""
    text = (await asyncio.to_thread(httpx.get, f"{url}/metrics")).text
    return sum(float(value) for value in re.findall(r"^curkv:request_success_total\S+ (\S+)", text, re.M))


async def headers_pass_through(client: httpx.AsyncClient) -> None:
    """Eviction controls and the request's id go in, what was done comes out, streaming or not."""
    headers = {"X-KV-Policy": "streaming-llm", "X-KV-Budget": "75%", "X-Request-Id": "mine-1"}
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 4, "stream": stream}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        assert answer.headers["X-KV-Policy"] == "streaming-llm", answer.headers
        assert int(answer.headers["X-KV-Budget-Tokens"]) > 0
        assert set(answer.headers.get_list("X-Request-Id")) == {"mine-1"}, answer.headers  # Ray adds its own
        assert not stream or answer.text.endswith(f"{DONE}\n\n")
    say("headers pass through: X-KV-Policy, X-KV-Budget, X-KV-Budget-Tokens, X-Request-Id; JSON and stream")


async def errors_pass_through(client: httpx.AsyncClient) -> None:
    """A bad value is the server's own 400, which names the header."""
    answer = await client.post("/v1/completions", json={"prompt": PROMPT}, headers={"X-KV-Budget": "-1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-KV-Budget"), answer.text
    say("errors pass through: 400 that names X-KV-Budget")


async def a_client_that_goes_away_frees_its_memory(
    fleet: Fleet, client: httpx.AsyncClient, homes: dict[str, str]
) -> None:
    """A stream is closed after its first token; the replica must then hold nothing."""
    session = next(iter(homes))
    async with streaming(client, session, 2000) as tokens:
        await anext(tokens)
    started = time.monotonic()
    urls = fleet.direct or [fleet.url]
    while True:
        states = [
            (await client.get(f"{u}/v1/kv/state", headers={"X-Session-Id": session})).json() for u in urls
        ]
        if not any(state["running"] or state["used_bytes"] for state in states):
            break
        assert time.monotonic() - started < 60, "the request still runs"
        await asyncio.sleep(0.1)
    say(f"a client that goes away frees its memory: {time.monotonic() - started:.1f} s later nothing is held")


@contextlib.asynccontextmanager
async def streaming(
    client: httpx.AsyncClient, session: str, tokens: int
) -> AsyncIterator[AsyncIterator[str]]:
    """A stream of one session: its lines with data."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    headers = {"X-Session-Id": session}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        yield (line async for line in answer.aiter_lines() if line)


async def a_killed_replica_costs_only_its_own_requests(
    fleet: Fleet, client: httpx.AsyncClient, homes: dict[str, str]
) -> None:
    """Kills one of the replicas while each answers a stream: one stream breaks, the other is whole."""
    sessions = [
        next(s for s, home in homes.items() if home == wanted) for wanted in sorted(set(homes.values()))
    ]
    begun = asyncio.Barrier(3)
    streams = [asyncio.create_task(read(client, session, begun)) for session in sessions]
    await begun.wait()
    os.kill(fleet.processes()[0], signal.SIGKILL)
    whole = await asyncio.gather(*streams)
    ended = time.monotonic()
    assert sorted(whole) == [False, True], f"streams that were whole: {whole}"
    refused: list[int] = []
    for session in sessions:
        while (status := (await attempt(client, session))) != 200:
            assert time.monotonic() - ended < 300, f"{session} is not served: {status}"
            refused.append(status)
            await asyncio.sleep(0.5)
    seconds = time.monotonic() - ended
    say(
        "a killed replica costs only its own requests: its stream broke, the other was whole; both sessions "
        f"were served within {seconds:.1f} s, after {len(refused)} refusals {refused}"
    )


async def read(client: httpx.AsyncClient, session: str, begun: asyncio.Barrier) -> bool:
    """Reads a stream to its end; whether it was whole."""
    last = ""
    try:
        async with streaming(client, session, 40) as lines:
            await anext(lines)
            await begun.wait()
            async for line in lines:
                last = line
    except httpx.TransportError:
        return False
    return last == DONE


async def attempt(client: httpx.AsyncClient, session: str) -> int:
    """Status of a short request of a session."""
    headers = {"X-Session-Id": session}
    answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers=headers)
    return answer.status_code


def say(text: str) -> None:
    """Prints a check that has passed."""
    print(f"ok  {text}", flush=True)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
