"""Bodies of GET /v1/kv/sessions and DELETE /v1/kv/sessions/{id}."""

from __future__ import annotations

from pydantic import BaseModel

from curkv.cache.sessions import SessionStats


class SessionList(BaseModel):
    """The sessions of an API key, the one used last first."""

    data: list[SessionStats]


class DroppedSession(BaseModel):
    """What dropping a session gave back.

    Attributes:
        id: its name.
        freed_bytes: bytes of the pages that went back to the pool; those that others share did not.
    """

    id: str
    freed_bytes: int
