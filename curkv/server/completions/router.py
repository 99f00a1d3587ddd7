"""Route of POST /v1/completions."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from curkv.server.completions.protocol import CompletionRequest, CompletionResponse
from curkv.server.completions.serving import CompletionAnswer, sampling, tokenize
from curkv.server.generation import documented, prepare, respond
from curkv.server.state import server_state

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", summary="Complete a prompt", **documented(CompletionResponse))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues one or several prompts, each with the KV cache that its eviction options leave it."""
    state, prompts = server_state(request), partial(tokenize, body)
    generation = await prepare(body, sampling(body), prompts, request, state, "cmpl")
    return await respond(CompletionAnswer(generation, body), request)
