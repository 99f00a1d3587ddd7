"""Routes of GET /v1/kv/sessions and DELETE /v1/kv/sessions/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Request

from curkv.server.errors import APIError, error_responses
from curkv.server.sessions.protocol import DroppedSession, SessionList
from curkv.server.state import server_state

router = APIRouter(tags=["cache"])


@router.get("/v1/kv/sessions", summary="List sessions", responses=error_responses(503))
async def list_sessions(request: Request) -> SessionList:
    """Lists the conversations that can go on; with API keys, those of the request's own."""
    server = server_state(request)
    return SessionList(data=await server.ready_client().sessions(server.key_of(request)))


@router.delete("/v1/kv/sessions/{id}", summary="Drop a session", responses=error_responses(404, 503))
async def drop_session(request: Request, id: str) -> DroppedSession:
    """Drops what is held of a conversation; its next turn starts afresh."""
    server = server_state(request)
    key = server.key_of(request)
    freed = await server.ready_client().drop_session(key, id, server.keys.tenant(key))
    if freed is None:
        raise APIError(404, f"there is no session {id!r}", "id", "session_not_found")
    return DroppedSession(id=id, freed_bytes=freed)
