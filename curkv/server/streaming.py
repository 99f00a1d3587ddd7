"""Outputs on their way to a client that may go away at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.types import Receive, Scope, Send

from curkv.engine.types import Output, Planned
from curkv.server.errors import NOT_AGAIN, APIError, ClientDisconnected, unavailable
from curkv.server.queue import Place

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

T = TypeVar("T")

STARTED_AT_ONCE = 16
"""Requests that are handed to the engine before the event loop goes on with what others want."""

DONE = "data: [DONE]\n\n"
EVENT_STREAM = "text/event-stream"


class OutputStream:
    """Outputs of several requests, run at once, in the order they come.

    `close` aborts what still runs; it is safe to call at any time, from a cancelled task too.

    Args:
        client: the engine.
        requests: requests with ids of their own.
        places: what each takes of the queue until it runs.
        timeout: seconds after which a 408 is raised instead of further outputs; None: never.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Planned],
        places: Sequence[Place],
        timeout: float | None,
    ):
        self._client = client
        self._places = places
        self._news: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()
        self._unfinished = len(requests)
        self._first: tuple[int, Output] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._starting = asyncio.create_task(self._start(requests))
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            message = f"the request was not finished after {timeout:g} s"
            error = APIError(408, message, code="timeout", headers=NOT_AGAIN)
            self._timer = asyncio.get_running_loop().call_later(timeout, self._news.put_nowait, error)

    async def _start(self, requests: Sequence[Planned]) -> None:
        for index, request in enumerate(requests):
            self._tasks.append(asyncio.create_task(self._run(index, request)))
            if len(self._tasks) % STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _run(self, index: int, request: Planned) -> None:
        place = self._places[index]
        try:
            async with aclosing(self._client.generate(request, place.leave)) as outputs:
                async for output in outputs:
                    self._news.put_nowait((index, output))
        except Exception as error:
            self._news.put_nowait(error)
        else:
            self._news.put_nowait(None)
        finally:
            place.leave()

    def __aiter__(self) -> Self:
        return self

    async def wait_for_first(self) -> None:
        """Waits for the first output and keeps it for the iteration; raises what the iteration would."""
        self._first = await anext(self)

    async def __anext__(self) -> tuple[int, Output]:
        """Returns (index of the request, output).

        Raises:
            APIError: the engine gave a choice up, or the time is over.
            InvalidRequest: what was asked turned out to be impossible on the way.
            EngineUnavailable: the engine takes no requests.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while self._unfinished:
            match await self._news.get():
                case None:
                    self._unfinished -= 1
                case Exception() as error:
                    raise error
                case index, output:
                    _raise_failure(output)
                    return index, output
        raise StopAsyncIteration

    def close(self) -> None:
        """Aborts the requests that have not ended."""
        self._unfinished = 0
        if self._timer is not None:
            self._timer.cancel()
        for task in (self._starting, *self._tasks):
            task.cancel()
        for place in self._places:  # a task that had not begun gives nothing back itself
            place.leave()


def _raise_failure(output: Output) -> None:
    if output.problem is not None:
        raise output.problem
    if output.finish_reason == "error":
        raise APIError(
            500, "the engine failed on this request; the server's log says more", code="engine_error"
        )
    if output.finish_reason == "abort":
        raise unavailable("the server ended the request before it was finished", "aborted")


async def unless_disconnected(request: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, but cancels it when the client goes away.

    Reads the ASGI receive channel, so the request's body must have been read before.

    Raises:
        ClientDisconnected: the client went away first.
    """
    working, watching = asyncio.ensure_future(work), asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnection(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: BaseModel, name: str | None = None, **dump: Any) -> str:
    """One server-sent event, with a name if given; further arguments go to `model_dump_json`."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data.model_dump_json(**dump)}\n\n"


class PieceStream(StreamingResponse):
    """A response made from pieces of `outputs`, which are closed however the response ends."""

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        outputs: OutputStream,
        media_type: str,
        headers: dict[str, str],
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(pieces, headers=headers, media_type=media_type)
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until the end or until the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outputs.close()
