"""Routes of Anthropic's API."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server.bodies import BodyRoute
from curkv.server.chat.conversation import converse, tokenize
from curkv.server.errors import MessagesError, error_responses
from curkv.server.generation import documented, respond
from curkv.server.messages.protocol import CountRequest, CountResponse, MessagesRequest, MessagesResponse
from curkv.server.messages.serving import MessagesAnswer
from curkv.server.state import server_state
from curkv.server.tokenizing import Reader
from curkv.server.workers import in_worker

router = APIRouter(tags=["dialects"], route_class=BodyRoute)

EXAMPLES: dict[str, Any] = {
    "question": {
        "summary": "A question",
        "value": {
            "max_tokens": 32,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        },
    }
}


@router.post(
    "/v1/messages",
    summary="Anthropic: continue a conversation",
    **documented(MessagesResponse, errors=MessagesError),
)
async def create_message(
    body: Annotated[MessagesRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Answers a conversation as Anthropic's API does; `cache_control` marks say where its context ends."""
    conversation = await converse(body.whole_chat, request, server_state(request), "msg")
    return await respond(MessagesAnswer(conversation), request)


@router.post(
    "/v1/messages/count_tokens",
    summary="Anthropic: count the tokens of a conversation",
    responses=error_responses(400, 404, 413, 503, shape=MessagesError),
)
async def count_tokens(body: CountRequest, request: Request) -> CountResponse:
    """Counts the tokens that the model would read, without generating."""
    state, chat = server_state(request), body.chat()
    client = state.ready_client()
    state.check_model(body.model)
    read = partial(tokenize, chat.messages, chat.rendering(chat.tool_use))
    [prompt] = await in_worker(lambda: read(client, Reader(client)))
    return CountResponse(input_tokens=len(prompt.token_ids))
