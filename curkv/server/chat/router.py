"""Route of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server.bodies import BodyRoute
from curkv.server.chat.conversation import converse
from curkv.server.chat.protocol import ChatRequest, ChatResponse
from curkv.server.chat.serving import ChatAnswer
from curkv.server.generation import documented, respond
from curkv.server.state import server_state

router = APIRouter(tags=["generation"], route_class=BodyRoute)

EXAMPLES: dict[str, Any] = {
    "question": {
        "summary": "A question",
        "value": {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_completion_tokens": 32,
            "temperature": 0,
        },
    },
    "document": {
        "summary": "A document that is compressed before the question is read",
        "value": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "text",
                            "text": "The tide turned shortly after six. The code of the vault is 4711.",
                            "cache_control": {"type": "ephemeral"},
                        },
                        {"type": "text", "text": "What is the code of the vault?"},
                    ],
                }
            ],
            "max_completion_tokens": 32,
            "temperature": 0,
            "kv": {"policy": "compactor", "budget": "75%", "sink_tokens": 1, "recent_tokens": 1},
        },
    },
    "schema": {
        "summary": "JSON that follows a schema",
        "value": {
            "messages": [{"role": "user", "content": "Describe Paris as JSON."}],
            "max_completion_tokens": 48,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "city",
                    "schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "country": {"type": "string"}},
                        "required": ["name", "country"],
                        "additionalProperties": False,
                    },
                },
            },
        },
    },
}


@router.post("/v1/chat/completions", summary="Continue a conversation", **documented(ChatResponse))
async def create_chat_completion(
    body: Annotated[ChatRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Answers a conversation; a `cache_control` mark says where its context ends."""
    conversation = await converse(body, request, server_state(request), "chatcmpl")
    return await respond(ChatAnswer(conversation), request)
