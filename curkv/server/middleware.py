"""Pure ASGI middleware: nothing here buffers a request or a response."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from curkv.server.errors import NOT_AGAIN, APIError, as_api_error
from curkv.server.keys import Keys
from curkv.server.logs import current_request, names_of

logger = logging.getLogger(__name__)

_ACCEPTABLE_ID = re.compile(r"[!-~]{1,128}")


class RequestIdMiddleware:
    """Gives every request an id, the client's own `X-Request-Id` if it is usable, and echoes it.

    The id is `scope["request_id"]`, and logs name it. Usable means 1 to 128 visible ASCII characters.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; adds a header to the response's start."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        current_request.set(names_of(request_id, headers.get("traceparent", "")))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class CrashMiddleware:
    """Answers 500 where the application fails, inside of what adds headers to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; a failure after the answer has begun ends the connection."""
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await as_api_error(error).response(scope)(scope, receive, send)


class ApiKeyMiddleware:
    """Answers 401 to requests without one of the keys, on every route but /health and /metrics.

    A key comes as `Authorization: Bearer KEY`, as `x-api-key: KEY` (Anthropic's clients), or as the password
    of basic authentication, with which a browser can open the page.
    """

    OPEN = frozenset({"/health", "/metrics"})

    def __init__(self, app: ASGIApp, keys: Keys, count: Callable[[str, int], None]):
        self.app = app
        self._keys = keys
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass."""
        if scope["type"] != "http" or scope["path"] in self.OPEN:
            await self.app(scope, receive, send)
            return
        if (name := self._name(Headers(scope=scope))) is not None:
            scope["api_key"] = name

            async def send_counted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._count(name, message["status"])
                    logger.info("%s: %s %s %d", name, scope["method"], scope["path"], message["status"])
                await send(message)

            await self.app(scope, receive, send_counted)
            return
        error = APIError(
            401,
            "no valid API key: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Bearer, Basic realm="curkv"'},
        )
        await error.response(scope)(scope, receive, send)

    def _name(self, headers: Headers) -> str | None:
        if (given := headers.get("x-api-key")) is not None:
            return self._keys.name_of(given.encode("latin-1"))
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # the bytes that came
        if scheme.lower() == "basic":
            key = _password(key)
        elif scheme.lower() != "bearer":
            return None
        return self._keys.name_of(key)


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class HeadMiddleware:
    """Answers HEAD as GET, without the body: probes ask so."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; the server above leaves out the body."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


class JSONValues:
    """Counts the values of a JSON text that comes in pieces, some more if it is none.

    Attributes:
        count: so far: of arrays, objects, names of members, and what is between commas.
    """

    def __init__(self) -> None:
        self.count = 1
        self._in_string = False
        self._escape = b""

    def add(self, piece: bytes) -> None:
        """Reads on; no byte is looked at by itself."""
        piece = self._escape + piece
        trailing = len(piece) - len(piece.rstrip(b"\\"))
        self._escape = b"\\" * (trailing % 2)
        piece = piece[: len(piece) - len(self._escape)].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        between = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self.count += sum(map(between.count, (b",", b"[", b"{", b":")))


class BodyMiddleware:
    """Answers 413 to a body larger than `max_bytes` and 408 to one that is not there after `seconds`.

    A body of more than `max_values` JSON values is a 413 too: reading and checking one holds up everybody.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_values: int, seconds: float):
        self.app = app
        self.max_bytes = max_bytes
        self.max_values = max_values
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the body while the application reads it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            await self._too_large().response(scope)(scope, receive, send)
            return
        received, complete, values = 0, False, JSONValues()
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def receive_checked() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            piece = message.get("body", b"")
            received += len(piece)
            if received > self.max_bytes:
                raise self._too_large()
            values.add(piece)
            if values.count > self.max_values:
                raise self._too_many()
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, receive_checked, send)

    def _too_slow(self) -> APIError:
        message = f"the body was not complete after {self.seconds:g} s"
        return APIError(408, message, code="body_too_slow", headers={"Connection": "close", **NOT_AGAIN})

    def _too_large(self) -> APIError:
        message = f"the body is larger than {self.max_bytes} bytes"
        return APIError(413, message, code="body_too_large")

    def _too_many(self) -> APIError:
        message = f"the body has more than {self.max_values} values"
        return APIError(413, message, code="body_too_large")
