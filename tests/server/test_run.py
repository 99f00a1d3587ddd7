"""Life of a server: the port, loading, draining, stopping."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from curkv.exits import Exit
from curkv.models.errors import ModelError
from curkv.server.logs import is_no_poll
from curkv.server.run import Server, StartupError, listen, serve
from tests.server.scripted import ScriptedClient, until

SCRIPT = """
from curkv.config import Settings
from curkv.server.run import Server, listen
from tests.server.scripted import ScriptedClient

server = Server(Settings(served_model_name="words"), lambda settings: ScriptedClient(delay=0.1))
server.run(sockets=[listen("127.0.0.1", {port})])
raise SystemExit(server.exit_status)
"""


@contextmanager
def served(build: Any, **settings: Any) -> Iterator[tuple[Server, httpx.AsyncClient]]:
    """A server in a thread; signals are delivered by calling their handler."""
    server = Server(Settings(served_model_name="words", **settings), build)
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


async def wait_for(http: httpx.AsyncClient, status: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await http.get("/health")).json()["status"] == status:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.02)


def test_connections_send_at_once() -> None:
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def complete(http: httpx.AsyncClient, **body: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(http.post("/v1/completions", json={"prompt": "w1", **body}))


async def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT.format(port=port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            await wait_for(http, "ready")
            running = [complete(http, max_tokens=15, stream=stream) for stream in (False, True)]
            await asyncio.sleep(0.4)
            process.send_signal(signal.SIGTERM)
            await wait_for(http, "draining")
            refused = await complete(http)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            answers = await asyncio.gather(*running)
        assert all(answer.status_code == 200 and "w15" in answer.text for answer in answers)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "X-KV-Policy: auto" in output and "/metrics" in output
    finally:
        process.kill()
        process.communicate()


async def test_requests_that_outlast_the_drain_end_with_an_error() -> None:
    client = ScriptedClient(delay=0.02)
    with served(lambda settings: client, drain_timeout=0.2) as (server, http):
        await wait_for(http, "ready")
        running = complete(http, max_tokens=200)
        await until(lambda: len(client.taken) == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert (await running).status_code == 503
        await until(lambda: server.should_exit)
    assert server.exit_status == 0


async def test_a_second_signal_ends_running_requests_at_once() -> None:
    client = ScriptedClient(delay=0.02)
    with served(lambda settings: client, drain_timeout=60) as (server, http):
        await wait_for(http, "ready")
        running = complete(http, max_tokens=200)
        await until(lambda: len(client.taken) == 1)
        started = time.monotonic()
        server.handle_exit(signal.SIGINT, None)
        await wait_for(http, "draining")
        server.handle_exit(signal.SIGINT, None)
        assert (await running).status_code == 503
        assert time.monotonic() - started < 3


async def test_health_answers_while_loading_and_a_signal_ends_it() -> None:
    ended = threading.Event()
    with served(lambda settings: ended.wait(30)) as (server, http):
        await wait_for(http, "loading")
        server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit
    ended.set()


async def test_a_model_that_cannot_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    def build(settings: Settings) -> ScriptedClient:
        raise ModelError("no such model")

    with served(build) as (server, _):
        await until(lambda: server.should_exit)
    assert server.exit_status == Exit.BAD_MODEL
    assert "no such model" in caplog.text and "Traceback" not in caplog.text


def test_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is taken"):
            serve(Settings(port=port))


def test_wrong_default_budget() -> None:
    with pytest.raises(StartupError, match="--kv-budget"):
        serve(Settings(port=0, kv_policy="curdkv", kv_budget="101%"))


def test_the_access_log_leaves_out_what_is_polled() -> None:
    def line(path: str) -> logging.LogRecord:
        arguments = ("127.0.0.1:1", "GET", path, "1.1", 200)
        return logging.LogRecord(
            "uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None
        )

    paths = ("/v1/completions", "/metrics", "/v1/kv/state", "/v1/models")
    assert [path for path in paths if is_no_poll(line(path))] == ["/v1/completions", "/v1/models"]


async def test_a_dead_engine_ends_the_process_after_a_last_look_at_its_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("curkv.server.run.FAREWELL_SECONDS", 0.5)
    client = ScriptedClient()
    with served(lambda settings: client) as (server, http):
        await wait_for(http, "ready")
        client.state = "dead"
        client.die()
        health = await http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert (await http.post("/v1/completions", json={"prompt": "w1"})).status_code == 503
        await until(lambda: not server.started or server.should_exit)
    assert server.exit_status == Exit.ENGINE_BROKEN


async def test_a_cache_smaller_than_the_context_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), served(lambda _: ScriptedClient(max_kv_tokens=96)) as (_, http):
        await wait_for(http, "ready")
        [model] = (await http.get("/v1/models")).json()["data"]
    assert (model["max_model_len"], model["max_kv_tokens"]) == (256, 96)
    assert "holds 96 tokens, less than the context of 256" in caplog.text
