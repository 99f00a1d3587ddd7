"""The asynchronous face of the engine: the server talks to this and never sees the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tokenizers import Tokenizer

from curkv.cache.layout import CacheLayout
from curkv.cache.sessions import SessionStats
from curkv.engine.engine import Engine
from curkv.engine.stats import StatsSink, StepStats
from curkv.engine.structure import Structures
from curkv.engine.types import EngineFault, Output, Planned, Request
from curkv.models.config import ModelConfig
from curkv.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from curkv.models.chat_template import ChatTemplate

logger = logging.getLogger(__name__)
T = TypeVar("T")

STORE_SECONDS = 10.0
"""Time that prefixes have to be written to disk when the engine ends."""

State = Literal["ready", "draining", "stopped", "dead"]


class EngineUnavailable(RuntimeError):
    """The engine takes no requests: it is draining, stopped or dead."""


class EngineClient:
    """Runs an engine in a thread of its own and hands its outputs to coroutines.

    Torch operations and Numba kernels release the GIL, so that the event loop stays responsive beside them.

    Attributes:
        state: `ready`, `draining` (no new requests), `stopped` or `dead` (the engine's thread failed).
    """

    def __init__(self, engine: Engine):
        self.state: State = "ready"
        self._engine = engine
        self._sinks: list[StatsSink] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, _Stream] = {}
        self._ended = False
        self._on_death: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    def start(cls, engine: Engine) -> EngineClient:
        """Starts the engine's thread."""
        client = cls(engine)
        client._thread.start()
        engine.watch(client._give_up)
        return client

    @property
    def model_config(self) -> ModelConfig:
        """Configuration of the model served."""
        return self._engine.runner.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.info.tokenizer

    @property
    def num_token_ids(self) -> int:
        """Token ids are below it, the tokenizer's and those that the model has rows for."""
        return self._engine.num_token_ids

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Writes out conversations for the model; None if it is no model for chat."""
        return self._engine.info.chat_template

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._engine.max_model_len

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens of prompt and output together of a request that keeps all of them."""
        return self._engine.max_kv_tokens

    @property
    def weights(self) -> str:
        """Type of the linear layers' weights."""
        return self._engine.runner.model.weights

    @property
    def weights_bytes(self) -> Mapping[str, int]:
        """Memory of the model's weights by kind."""
        return self._engine.runner.model.weights_bytes

    @property
    def pruning(self) -> Mapping[str, Any] | None:
        """How the model was pruned, see `load_pruning`; None if it was not."""
        return self._engine.info.pruning

    @property
    def cache_layout(self) -> CacheLayout:
        """Shape of the KV cache."""
        return self._engine.kv.layout

    @property
    def healthy(self) -> bool:
        """Whether new requests are taken."""
        return self.state == "ready" and self._thread.is_alive()

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        return self._engine.info.vocabulary

    @property
    def structures(self) -> Structures:
        """Compiles what outputs are to follow."""
        return self._engine.structures

    @property
    def stats(self) -> StepStats:
        """State of the engine after its last step."""
        return self._engine.last_stats

    def add_sink(self, sink: StatsSink) -> None:
        """Calls `sink` with the statistics of every step, from the engine's thread."""
        self._sinks.append(sink)

    def on_death(self, act: Callable[[], object]) -> None:
        """Calls `act`, from the engine's thread, if that fails and once every stream has got its error."""
        with self._wake:
            if not self._ended:
                self._on_death.append(act)
                return
        if self.state == "dead":
            act()

    def plan(self, request: Request) -> Planned:
        """Checks a request and resolves its eviction options; takes nothing. May be slow.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        return self._engine.plan(request)

    async def generate(
        self, planned: Planned, started: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Output, None]:
        """Yields news of all choices of a request until each has ended.

        Closing the iterator, or cancelling the task that reads it, aborts the request and frees its pages.

        Args:
            planned: the request.
            started: called on the event loop when it waits no longer but runs.

        Raises:
            EngineUnavailable: the engine takes no requests.
        """
        if not self.healthy:
            raise EngineUnavailable(f"the engine is {self.state}")
        request = planned.request
        stream = _Stream(asyncio.get_running_loop(), started)
        self._streams[request.id] = stream
        unfinished = request.sampling.n
        try:
            self._submit(lambda: self._add(planned, stream))
            while unfinished:
                for output in await stream.next():
                    unfinished -= output.finish_reason is not None
                    yield output
        finally:
            self._streams.pop(request.id, None)
            if unfinished:
                with contextlib.suppress(EngineUnavailable):  # then it holds nothing any more
                    self._submit(lambda: self._engine.abort(request.id))

    async def drop_prefixes(self, tenant: str = "") -> int:
        """Drops the prefixes that no running sequence uses.

        Args:
            tenant: whose they are; "": everybody's.

        Returns:
            Bytes of the cache that are free again.

        Raises:
            EngineUnavailable: the engine's thread has ended.
        """
        return await self._ask(lambda: self._engine.drop_prefixes(tenant))

    async def sessions(self, owner: str) -> list[SessionStats]:
        """The sessions of an API key that can go on, the one used last first.

        Raises:
            EngineUnavailable: the engine's thread has ended.
        """
        return await self._ask(lambda: self._engine.sessions(owner))

    async def drop_session(self, owner: str, name: str, tenant: str = "") -> int | None:
        """Drops a session, in memory and on disk.

        Returns:
            Bytes of the cache that are free again; None: the key has no session of that name.

        Raises:
            EngineUnavailable: the engine's thread has ended.
        """
        return await self._ask(lambda: self._engine.drop_session(owner, name, tenant))

    async def _ask(self, question: Callable[[], T]) -> T:
        """Has the engine's thread do something between two steps, and gives what comes of it."""
        answer: Future[T] = Future()

        def reply() -> None:
            if answer.set_running_or_notify_cancel():  # else the caller went away
                try:
                    answer.set_result(question())
                except Exception as error:
                    answer.set_exception(error)

        self._submit(reply)
        return await asyncio.wrap_future(answer)

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones.

        Args:
            timeout: longest wait in seconds.

        Returns:
            Whether all of them ended in time.
        """
        self.state = "draining"
        deadline = time.monotonic() + timeout
        while self._streams and self._thread.is_alive():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def stop(self) -> None:
        """Ends the engine's thread after its current step; what still runs is aborted."""
        if self.state != "dead":
            self.state = "stopped"
        with contextlib.suppress(EngineUnavailable):  # it has ended
            self._submit(lambda: None)
        self._thread.join()

    def _add(self, planned: Planned, stream: _Stream) -> None:
        try:
            self._engine.add(planned)
        except Exception as error:
            logger.exception("a request was not taken")
            fault = EngineFault("add")
            fault.__cause__ = error
            stream.put(fault)

    def _give_up(self, error: Exception) -> None:
        """Ends the engine's thread with an error, if it has not ended; any thread may call it."""

        def fail() -> None:
            raise error

        with contextlib.suppress(EngineUnavailable):
            self._submit(fail)

    def _submit(self, command: Callable[[], None]) -> None:
        """Has the engine's thread run a command between two steps.

        Raises:
            EngineUnavailable: that has ended.
        """
        with self._wake:
            if self._ended:
                raise EngineUnavailable(f"the engine is {self.state}")
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self.state != "stopped":
                self._obey()
                self._publish(self._engine.step())
                self._engine.check_faults()
            for request_id in list(self._streams):
                self._engine.abort(request_id)
        except BaseException as error:
            self.state = "dead"
            logger.critical("the engine is given up: %s", error, exc_info=True)
        finally:
            self._end()

    def _end(self) -> None:
        """Takes nothing more, and answers all who wait."""
        with self._wake:
            self._ended = True
        while self._inbox:
            with contextlib.suppress(Exception):
                self._inbox.popleft()()
        for stream in list(self._streams.values()):
            stream.put(EngineUnavailable(f"the engine is {self.state}"))
        if self.state != "dead":
            with contextlib.suppress(Exception):
                self._engine.close(STORE_SECONDS)
        else:
            for act in self._on_death:
                act()

    def _obey(self) -> None:
        """Runs queued commands; with nothing to do, checks the cache and waits for the next one."""
        if not self._inbox and not self._engine.has_work:
            self._engine.check_integrity()
            with self._wake:
                self._wake.wait_for(lambda: self._inbox)
        while self._inbox:
            self._inbox.popleft()()

    def _publish(self, outputs: list[Output]) -> None:
        news: dict[_Stream, list[Output]] = {}
        for output in outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                news.setdefault(stream, []).append(output)
        _Stream.put_all(news)
        for request_id in self._engine.last_stats.started:
            if (stream := self._streams.get(request_id)) is not None:
                stream.start()
        for sink in self._sinks:
            try:
                sink(self._engine.last_stats)
            except Exception:
                logger.exception("statistics of a step were not taken")


class _Stream:
    """Outputs of one request on their way from the engine's thread to a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop, started: Callable[[], None]):
        self._loop = loop
        self._started = started
        self._queue: asyncio.Queue[list[Output] | Exception] = asyncio.Queue()

    def start(self) -> None:
        """Says that its request runs."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._started)

    def put(self, item: list[Output] | Exception) -> None:
        self.put_all({self: item})

    @staticmethod
    def put_all(items: Mapping[_Stream, list[Output] | Exception]) -> None:
        """Hands over what is new of several streams; waking a loop costs most of it and is done once."""
        for loop in {stream._loop for stream in items}:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(_Stream._deliver, items, loop)

    @staticmethod
    def _deliver(items: Mapping[_Stream, list[Output] | Exception], loop: asyncio.AbstractEventLoop) -> None:
        for stream, item in items.items():
            if stream._loop is loop:
                stream._queue.put_nowait(item)

    async def next(self) -> list[Output]:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item
