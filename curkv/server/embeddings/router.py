"""Routes of embeddings."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from numpy.typing import NDArray
from pydantic import BaseModel

from curkv.server import limits
from curkv.server.bodies import BodyRoute
from curkv.server.embeddings.protocol import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    EmbedRequest,
    EmbedResponse,
    OlderEmbedRequest,
    OlderEmbedResponse,
)
from curkv.server.embeddings.serving import embed
from curkv.server.errors import ErrorResponse, OllamaError, error_responses
from curkv.server.state import server_state

router = APIRouter(tags=["embeddings"], route_class=BodyRoute)


def _documented(errors: type[BaseModel]) -> dict[str, Any]:
    return {
        "responses": error_responses(400, 404, 408, 413, 429, 500, 503, shape=errors),
        "openapi_extra": {"parameters": limits.OPENAPI_PARAMETERS},
    }


_NANOSECONDS = 1_000_000_000

EXAMPLES: dict[str, Any] = {
    "two": {"summary": "Two texts", "value": {"input": ["The tide turned shortly after six.", "High water"]}}
}


@router.post("/v1/embeddings", summary="Vectors of texts", **_documented(ErrorResponse))
async def create_embeddings(
    body: Annotated[EmbeddingRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> EmbeddingResponse:
    """Gives the mean of the model's last hidden states over each text, scaled to length 1.

    The models served were trained to continue text and not to compare it: texts that are about the same are
    closer than others, but less reliably than with a model made for it.
    """
    found = await embed(body, body.prompts, body.truncate_prompt_tokens, request, server_state(request))
    worded = _base64 if body.encoding_format == "base64" else _floats
    data = [Embedding(index=index, embedding=worded(vector)) for index, vector in enumerate(found.vectors)]
    usage = EmbeddingUsage(prompt_tokens=found.tokens, total_tokens=found.tokens)
    return EmbeddingResponse(data=data, model=found.model, usage=usage)


@router.post("/api/embed", summary="Ollama: vectors of texts", **_documented(OllamaError))
async def ollama_embed(body: EmbedRequest, request: Request) -> EmbedResponse:
    """The same as Ollama has it."""
    began, state = time.monotonic(), server_state(request)
    body.model = state.untagged(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    found = await embed(body, texts, -1 if body.truncate is not False else None, request, state)
    return EmbedResponse(
        model=found.model,
        embeddings=found.vectors.tolist(),
        total_duration=int((time.monotonic() - began) * _NANOSECONDS),
        prompt_eval_count=found.tokens,
    )


@router.post(
    "/api/embeddings", summary="Ollama: the vector of a text, older form", **_documented(OllamaError)
)
async def ollama_embeddings(body: OlderEmbedRequest, request: Request) -> OlderEmbedResponse:
    """The same of one text."""
    state = server_state(request)
    body.model = state.untagged(body.model)
    found = await embed(body, [body.prompt], -1, request, state)
    return OlderEmbedResponse(embedding=found.vectors[0].tolist())


def _floats(vector: NDArray[np.float32]) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
