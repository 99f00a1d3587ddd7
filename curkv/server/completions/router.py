"""Route of POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from curkv.server.completions.protocol import CompletionRequest, CompletionResponse
from curkv.server.completions.serving import Completion, complete, events, prepare
from curkv.server.errors import error_responses
from curkv.server.headers import OPENAPI_PARAMETERS, OPENAPI_RESPONSE_HEADERS
from curkv.server.state import server_state
from curkv.server.streaming import ClientDisconnected, EventStream, unless_disconnected

router = APIRouter(tags=["generation"])

CLIENT_CLOSED_REQUEST = 499


@router.post(
    "/v1/completions",
    summary="Complete a prompt",
    response_model=CompletionResponse,
    responses={
        200: {
            "description": "The completion; with `stream: true`, chunks of it ending in `data: [DONE]`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "headers": OPENAPI_RESPONSE_HEADERS,
        },
        **error_responses(400, 404, 413, 500, 503),
    },
    openapi_extra={"parameters": OPENAPI_PARAMETERS},
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues one or several prompts, each with the KV cache that its eviction options leave it."""
    completion = await prepare(body, request.headers, server_state(request))
    try:
        if body.stream:
            return await _stream(completion, request)
        answer = await unless_disconnected(request, complete(completion))
    except ClientDisconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(answer.model_dump(mode="json"), headers=completion.headers)


async def _stream(completion: Completion, request: Request) -> Response:
    """Starts the stream with its first token, so that what fails before it gets an error status."""
    outputs = completion.start()
    try:
        await unless_disconnected(request, outputs.wait_for_first())
    except BaseException:
        outputs.close()
        raise
    return EventStream(events(completion, outputs), outputs, completion.headers)
