"""Routes for whoever watches the server."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

import curkv
from curkv.server.errors import RETRY_AFTER_SECONDS, error_responses
from curkv.server.state import server_state

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["loading", "ready", "draining", "stopped", "dead"]


@router.get(
    "/health",
    summary="Is the server ready?",
    response_model=Health,
    responses={503: {"model": Health, "description": "Requests are not taken."}},
)
async def health(request: Request, response: Response) -> dict[str, str]:
    """Answers 200 when requests are taken, 503 while loading, draining, or when the engine is dead."""
    phase = server_state(request).phase
    if phase != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return {"status": phase}


class Version(BaseModel):
    """What runs."""

    version: str


@router.get("/version", summary="Version of the server", responses=error_responses())
async def version() -> Version:
    """Names the version of curkv."""
    return Version(version=curkv.__version__)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format, unless they have a port of their own."""
    if server_state(request).settings.server.metrics_port is not None:
        raise HTTPException(404)
    return Response(server_state(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
