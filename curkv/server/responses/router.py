"""Routes of OpenAI's newer API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server.bodies import BodyRoute
from curkv.server.chat.conversation import converse
from curkv.server.errors import error_responses
from curkv.server.generation import documented, respond
from curkv.server.responses.protocol import DeletedResponse, ResponseObject, ResponsesRequest
from curkv.server.responses.serving import ResponsesAnswer, answered
from curkv.server.state import server_state

router = APIRouter(tags=["dialects"], route_class=BodyRoute)

EXAMPLES: dict[str, Any] = {
    "question": {
        "summary": "A question",
        "value": {"input": "What is the capital of France?", "max_output_tokens": 32, "temperature": 0},
    }
}


@router.post(
    "/v1/responses", summary="OpenAI's newer API: continue a conversation", **documented(ResponseObject)
)
async def create_response(
    body: Annotated[ResponsesRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Answers a conversation in items, and keeps it for those that go on with it unless `store` is false."""
    state = server_state(request)
    key, store = state.key_of(request), state.responses
    before = body.previous_response_id
    earlier = store.get(key, before, "previous_response_id").messages if before is not None else []
    messages = body.messages(earlier)

    def keep(answer: ResponseObject, text: str) -> None:
        if body.store is not False:
            store.put(key, answer.id, [*messages, *answered(answer)], text)

    conversation = await converse(body.chat(messages), request, state, "resp")
    return await respond(ResponsesAnswer(conversation, body, keep), request)


@router.get(
    "/v1/responses/{response_id}",
    summary="A response that is kept",
    response_model=ResponseObject,
    responses=error_responses(404),
)
async def get_response(response_id: str, request: Request) -> Response:
    """Gives a response of the same API key, if it is still kept."""
    state = server_state(request)
    kept = state.responses.get(state.key_of(request), response_id)
    return Response(kept.answer, media_type="application/json")


@router.delete("/v1/responses/{response_id}", summary="Let go of a response", responses=error_responses(404))
async def delete_response(response_id: str, request: Request) -> DeletedResponse:
    """Keeps a response of the same API key no more."""
    state = server_state(request)
    state.responses.drop(state.key_of(request), response_id)
    return DeletedResponse(id=response_id)
