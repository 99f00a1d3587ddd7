"""Connections that do not wait forever for a request to begin."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def impatient(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn that closes a connection when a request's header takes longer than `seconds`.

    uvicorn itself only limits the idle time between two requests, so that a client which sends nothing, or a
    byte now and then, would hold its connection for as long as it likes.
    """

    class ImpatientProtocol(H11Protocol):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            """Lets the time run while a header is awaited, and stops it when the header is complete."""
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._limit is None:
                self._limit = self.loop.call_later(seconds, self.transport.close)

        def _forget(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return ImpatientProtocol
