"""Pure ASGI middleware: nothing here buffers a request or a response."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from curkv.server.errors import APIError

_ACCEPTABLE_ID = re.compile(r"[!-~]{1,128}")


class RequestIdMiddleware:
    """Gives every request an id, the client's own `X-Request-Id` if it is usable, and echoes it.

    The id is `scope["request_id"]`. Usable means 1 to 128 visible ASCII characters.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; adds a header to the response's start."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class ApiKeyMiddleware:
    """Answers 401 to requests without one of the keys, on every route but /health and /metrics.

    A key comes as `Authorization: Bearer KEY`, or as the password of basic authentication, with which a
    browser can open the page.
    """

    OPEN = frozenset({"/health", "/metrics"})

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass."""
        if scope["type"] != "http" or scope["path"] in self.OPEN or self._known(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = APIError(
            401,
            "no valid API key: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Bearer, Basic realm="curkv"'},
        )
        await error.response()(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode()
        if scheme.lower() == "basic":
            key = _password(key)
        elif scheme.lower() != "bearer":
            return False
        matches = [hmac.compare_digest(key, known) for known in self._keys]  # all of them: constant time
        return any(matches)


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class BodyMiddleware:
    """Answers 413 to a body larger than `max_bytes` and 408 to one that is not there after `seconds`."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the body while the application reads it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received, complete = 0, False
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
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, receive_checked, send)

    def _too_slow(self) -> APIError:
        message = f"the body was not complete after {self.seconds:g} s"
        return APIError(408, message, code="body_too_slow", headers={"Connection": "close"})

    def _too_large(self) -> APIError:
        return APIError(413, f"the body is larger than {self.max_bytes} bytes", code="body_too_large")
