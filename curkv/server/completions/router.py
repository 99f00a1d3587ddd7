"""Route of POST /v1/completions."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server.bodies import BodyRoute
from curkv.server.completions.protocol import CompletionRequest, CompletionResponse
from curkv.server.completions.serving import CompletionAnswer, sampling, tokenize
from curkv.server.generation import documented, prepare, respond
from curkv.server.state import server_state

router = APIRouter(tags=["generation"], route_class=BodyRoute)

EXAMPLES: dict[str, Any] = {
    "plain": {
        "summary": "The whole cache",
        "value": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    },
    "evicting": {
        "summary": "Half of the prompt's cache, streamed, with usage.kv at the end",
        "value": {
            "prompt": "The tide turned shortly after six. The code of the vault is 4711. The code is",
            "max_tokens": 8,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "kv": {"policy": "snapcur", "budget": "50%", "recent_tokens": 4},
        },
    },
    "logprobs": {
        "summary": "Probabilities of the prompt's own tokens",
        "value": {"prompt": "The capital of France is Paris", "echo": True, "logprobs": 1, "max_tokens": 0},
    },
}


@router.post("/v1/completions", summary="Complete a prompt", **documented(CompletionResponse))
async def create_completion(
    body: Annotated[CompletionRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Continues one or several prompts, each with the KV cache that its eviction options leave it."""
    state, asked, prompts = server_state(request), partial(sampling, body), partial(tokenize, body)
    generation = await prepare(body, asked, len(body.prompts), prompts, request, state, "cmpl")
    return await respond(CompletionAnswer(generation, body), request)
