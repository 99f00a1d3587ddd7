"""Route of POST /v1/kv/explain."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server import headers, limits
from curkv.server.bodies import BodyRoute
from curkv.server.errors import error_responses
from curkv.server.explain.protocol import ExplainRequest, ExplainResponse
from curkv.server.explain.serving import explain, prepare
from curkv.server.state import server_state
from curkv.server.streaming import unless_disconnected

router = APIRouter(tags=["eviction"], route_class=BodyRoute)

EXAMPLES: dict[str, Any] = {
    "two policies": {
        "summary": "Two policies at half of the cache",
        "value": {
            "prompt": "The tide turned shortly after six. The code of the vault is 4711. The code is",
            "policies": [
                {"policy": "snapcur", "budget": "50%", "recent_tokens": 4},
                {"policy": "streaming-llm", "budget": "50%", "recent_tokens": 4},
            ],
        },
    }
}


@router.post(
    "/v1/kv/explain",
    summary="What policies would keep of a prompt",
    response_model=ExplainResponse,
    responses=error_responses(400, 404, 408, 413, 429, 500, 503),
    openapi_extra={"parameters": [*headers.OPENAPI_PARAMETERS, *limits.OPENAPI_PARAMETERS]},
)
async def explain_eviction(
    body: Annotated[ExplainRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Computes the prompt once, asks every policy what it would keep, and generates nothing."""
    state = server_state(request)
    question = await prepare(body, request, state)
    try:
        answer = await unless_disconnected(request, explain(body, question, state))
    finally:
        question.place.leave()
    return Response(answer, media_type="application/json")
