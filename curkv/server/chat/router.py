"""Route of POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from curkv.server.chat.protocol import ChatRequest, ChatResponse
from curkv.server.chat.serving import ChatAnswer, tokenize
from curkv.server.generation import documented, prepare, respond
from curkv.server.state import server_state

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", summary="Continue a conversation", **documented(ChatResponse))
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation; a `cache_control` mark says where its context ends."""
    state, sampling = server_state(request), body.sampling(body.wanted_tokens, body.wanted_logprobs)
    prompts = partial(tokenize, body.messages, body.chat_template_kwargs or {})
    generation = await prepare(body, sampling, prompts, request, state, "chatcmpl")
    return await respond(ChatAnswer(generation, body), request)
