"""Routes of embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from numpy.typing import NDArray

from curkv.server.bodies import BodyRoute
from curkv.server.embeddings.protocol import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
)
from curkv.server.embeddings.serving import documented, embed
from curkv.server.errors import ErrorResponse
from curkv.server.state import server_state

router = APIRouter(tags=["embeddings"], route_class=BodyRoute)


EXAMPLES: dict[str, Any] = {
    "two": {"summary": "Two texts", "value": {"input": ["The tide turned shortly after six.", "High water"]}}
}


@router.post("/v1/embeddings", summary="Vectors of texts", **documented(ErrorResponse))
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


def _floats(vector: NDArray[np.float32]) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
