"""Connections that do not wait forever for a request to begin."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_SECONDS = 3.0


def impatient(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn that closes a connection when a request's header takes longer than `seconds`.

    uvicorn itself only limits the idle time between two requests, so that a client which sends nothing, or a
    byte now and then, would hold its connection for as long as it likes. The same holds for a body that has
    been answered before it was complete: its rest has `LINGER_SECONDS`, in which the client can read why.
    """

    class ImpatientProtocol(H11Protocol):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            """Lets the time run while a header, or the rest of a body that nobody wants, is awaited."""
            answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
            if self.conn.their_state is not h11.IDLE and not answered:
                self._forget()
            elif self._limit is None:
                limit = LINGER_SECONDS if answered else seconds
                self._limit = self.loop.call_later(limit, self.transport.close)

        def _forget(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return ImpatientProtocol
