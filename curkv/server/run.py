"""A server process from its first second to its last: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import pickle
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server

import curkv
from curkv.cache.options import OptionError
from curkv.config import Settings
from curkv.exits import Exit, StartupError
from curkv.kernels import compile_cache
from curkv.models.errors import ModelError, ModelUnreachable
from curkv.server.app import create_app
from curkv.server.connections import impatient
from curkv.server.keys import KeysError
from curkv.server.logs import configure_logging
from curkv.server.process import keep_freed_memory, share_heap, spare_collector, trim_heap, unmap_code
from curkv.server.state import ServerState

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient
    from curkv.engine.engine import Engine
    from curkv.server.tracing import Tracing

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEEP_ALIVE_SECONDS = 30
CLOSE_SECONDS = 5
"""Time that answers have to be written after the engine has finished or been stopped."""
FAREWELL_SECONDS = 2
"""Time for which a server with a dead engine still answers, /health with 503."""
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def serve(settings: Settings) -> int:
    """Serves until a signal asks to stop, and returns the exit status.

    Raises:
        StartupError: the port is taken or a setting is wrong; nothing has been loaded.
    """
    configure_logging(settings.server.log_format)
    share_heap()
    try:
        server = Server(settings)
    except KeysError as error:
        raise StartupError(f"--api-key-file: {error}", Exit.BAD_OPTION) from error
    except OptionError as error:
        raise StartupError(
            f"--kv-{error.field.replace('_', '-')}: {error.message}", Exit.BAD_OPTION
        ) from error
    _check_certificate(settings)
    where = settings.server
    if where.host not in LOCAL_HOSTS and not (where.api_key or where.api_key_file):
        logger.warning("whoever reaches %s can use this server: no --api-key is set", where.host)
    if where.metrics_port is not None:
        server.serve_metrics(where.host, where.metrics_port)
    server.run(sockets=[listen(where.host, where.port)])
    return server.exit_status


def _check_certificate(settings: Settings) -> None:
    if settings.server.ssl_certfile is None:
        if settings.server.ssl_keyfile is not None:
            raise StartupError("--ssl-keyfile needs --ssl-certfile", Exit.BAD_OPTION)
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.server.ssl_certfile, settings.server.ssl_keyfile, lambda: "")
    except OSError as error:
        raise StartupError(f"--ssl-certfile or --ssl-keyfile: {error}", Exit.BAD_OPTION) from error


def listen(host: str, port: int) -> socket.socket:
    """Opens the port.

    Raises:
        StartupError: it is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} on {host} is taken: stop what uses it or choose another --port",
                Exit.NO_RESOURCE,
            ) from error
        raise StartupError(
            f"cannot listen on {host} port {port}: {error.strerror}", Exit.NO_RESOURCE
        ) from error
    # Connections inherit it. asyncio sets it only on sockets whose protocol was named, and without it what
    # follows the head of an answer waits up to 40 ms for the client to acknowledge that.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _tracing(settings: Settings) -> Tracing | None:
    endpoint = settings.server.otlp_traces_endpoint
    if endpoint is None:
        return None
    try:
        from curkv.server.tracing import Tracing, send_to
    except ImportError as error:
        raise StartupError(
            f"--otlp-traces-endpoint needs OpenTelemetry: pip install 'curkv[otel]' ({error})",
            Exit.BAD_OPTION,
        ) from error
    return Tracing(settings.model_name, send_to(endpoint))


def build_client(settings: Settings) -> EngineClient:
    """Loads the model and starts the engine; takes seconds, or minutes if the model has to be fetched.

    Raises:
        ModelError: the model cannot be used.
        ValueError: an option does not go with the model or the machine.
        OSError: the cache directory cannot be used.
        MemoryError: the KV cache is larger than the memory.
    """
    compile_cache.check()
    keep_freed_memory()
    try:
        engine = _build_engine(settings)
    except (EOFError, pickle.UnpicklingError):
        logger.warning("compiled kernels on disk are damaged: they are compiled anew")
        compile_cache.drop()
        engine = _build_engine(settings)
    from curkv.engine.client import EngineClient

    spare_collector()
    trim_heap()
    unmap_code()
    return EngineClient.start(engine)


def _build_engine(settings: Settings) -> Engine:
    from curkv.engine.build import build_engine

    return build_engine(settings.engine, _prepare_structures)


def _prepare_structures(engine: Engine) -> None:
    """Makes what structured output needs beside the warm-up, half of which is no work for the interpreter."""
    # not a daemon, which would be torn out of llguidance's code where a server ends at once
    threading.Thread(target=engine.structures.warm_up, name="structures").start()


def exit_of(error: Exception) -> Exit:
    """With which status a start ends that ran into an error; all but `FAILED` are told in a line."""
    from curkv.engine.faults import EngineBroken
    from curkv.ranks import RankLost

    match error:
        case ModelUnreachable() | OSError() | MemoryError():
            return Exit.NO_RESOURCE
        case ModelError():
            return Exit.BAD_MODEL
        case ValueError():
            return Exit.BAD_OPTION
        case EngineBroken() | RankLost():
            return Exit.ENGINE_BROKEN
        case _:
            return Exit.FAILED


class Server(uvicorn.Server):
    """Answers /health from the first moment, loads the engine beside it, and drains before it stops.

    The first SIGTERM or SIGINT drains: the port stays open, new requests get 503, running ones may finish
    within `drain_timeout`, after which, or at a second signal, they end with a 503.

    Attributes:
        exit_status: 0, or why the engine could not be loaded or go on.
    """

    def __init__(self, settings: Settings, build: Callable[[Settings], EngineClient] = build_client):
        app = create_app(None, settings, self._lifespan)
        super().__init__(
            uvicorn.Config(
                app,
                http=impatient(settings.limits.receive_timeout),
                lifespan="on",
                ssl_certfile=settings.server.ssl_certfile,
                ssl_keyfile=settings.server.ssl_keyfile,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self.exit_status = Exit.DONE
        self._settings = settings
        self._build = build
        self._state: ServerState = app.state.server
        self._tracing = _tracing(settings)
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_metrics(self, host: str, port: int) -> None:
        """Serves the metrics on a port of their own, from a thread.

        Raises:
            StartupError: it is taken, or the address is not this machine's.
        """
        try:
            start_http_server(port, host, self._state.metrics.registry)
        except OSError as error:
            raise StartupError(
                f"--metrics-port: cannot listen on {host} port {port}: {error.strerror}", Exit.NO_RESOURCE
            ) from error

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal, ends running requests on the second, drops everything on the third."""
        if self.should_exit:
            self.force_exit = True
        elif self._loop is None or self._state.client is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain_or_hurry, self._state.client)

    def _drain_or_hurry(self, client: EngineClient) -> None:
        if self._draining is None:
            logger.info("draining: running requests have %g s to finish", self._settings.limits.drain_timeout)
            self._draining = asyncio.create_task(self._drain(client))
        else:
            self._draining.cancel()

    async def _drain(self, client: EngineClient) -> None:
        try:
            finished = await client.drain(self._settings.limits.drain_timeout)
        except asyncio.CancelledError:
            finished = False
        if not finished:
            logger.warning("requests that still run are ended")
            await asyncio.to_thread(client.stop)
        self.should_exit = True

    def _give_up(self) -> None:
        """Ends a process whose engine is dead, once whoever watches it could see that."""
        self.exit_status = Exit.ENGINE_BROKEN
        logger.critical("the server stops: its engine is dead")
        asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        loading = asyncio.create_task(self._load())
        lag = asyncio.create_task(self._state.metrics.watch_event_loop())
        yield
        loading.cancel()
        lag.cancel()
        await self._state.vetting.kill()
        if self._state.client is not None:
            await asyncio.to_thread(self._state.client.stop)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _load(self) -> None:
        started = time.perf_counter()
        try:
            client = await _in_daemon_thread(lambda: self._build(self._settings))
        except Exception as error:
            self.exit_status, self.should_exit = exit_of(error), True
            unforeseen = error if self.exit_status == Exit.FAILED else None
            logger.critical("the engine did not start: %s", error, exc_info=unforeseen)
            return
        self._state.attach(client)
        if self._tracing is not None:
            client.add_sink(self._tracing.observe)
        if client.max_kv_tokens < client.max_model_len:
            logger.warning(
                "the KV cache holds %d tokens, less than the context of %d: longer requests must evict, or "
                "--kv-cache-memory be larger",
                client.max_kv_tokens,
                client.max_model_len,
            )
        loop = asyncio.get_running_loop()
        client.on_death(lambda: loop.call_soon_threadsafe(self._give_up))
        print(self._welcome(time.perf_counter() - started), flush=True)

    def _welcome(self, seconds: float) -> str:
        client = self._state.client
        assert client is not None
        layout, stats = client.cache_layout, client.stats
        return WELCOME.format(
            version=curkv.__version__,
            model=self._settings.model_name,
            seconds=seconds,
            memory=stats.capacity_bytes / 2**30,
            pages=stats.num_pages,
            page_size=layout.page_size,
            dtype=layout.format.name,
            asked_dtype=self._settings.engine.kv_dtype,
            policy=self._settings.kv.policy,
            weights=client.weights,
            asked=self._settings.engine.weights,
            size=sum(client.weights_bytes.values()) / 2**30,
            url=self._url(),
        )

    def _url(self) -> str:
        """Where a browser on this machine finds the server."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        scheme = "https" if self._settings.server.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


WELCOME = """
curkv {version} serves {model} at {url} (loaded in {seconds:.1f} s)
Weights: {weights} (--weights {asked}), {size:.2f} GiB
KV cache: {dtype} (--kv-dtype {asked_dtype}), {memory:.2f} GiB, {pages:,} pages of {page_size} tokens
Default policy: {policy}

Try a long prompt with the whole cache and with a quarter of it, and compare usage.kv:

  python3 -c 'import json; print(json.dumps(dict(max_tokens=24, temperature=0,
    prompt="The code of the vault is 4711. " + "Rivers carry rain from the hills to the sea. " * 90
           + "The code of the vault is")))' > prompt.json
  curl {url}/v1/completions -H 'Content-Type: application/json' -d @prompt.json
  curl {url}/v1/completions -H 'Content-Type: application/json' -d @prompt.json \\
    -H 'X-KV-Policy: auto' -H 'X-KV-Budget: 25%'

Page: {url}    Metrics: {url}/metrics    API: {url}/docs    Policies: curkv model policies    Stop: Ctrl-C
"""


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Awaits `work` in a thread that does not keep the process alive, unlike those of an executor."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(future)
