"""Routes of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from curkv.engine.types import check_ids
from curkv.server.bodies import BodyRoute
from curkv.server.errors import error_responses
from curkv.server.state import server_state
from curkv.server.tokenizing import Reader
from curkv.server.tokens.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

router = APIRouter(tags=["tokens"], responses=error_responses(400, 404, 408, 413, 503), route_class=BodyRoute)


@router.post("/tokenize", summary="Turn a prompt into tokens", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Gives the tokens that a text or a conversation has for the model."""
    state = server_state(request)
    client = state.ready_client()
    state.check_model(body.model)
    return await in_worker(lambda: _tokenized(body, client))


@router.post("/detokenize", summary="Turn tokens into text", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Gives the text of tokens."""
    state = server_state(request)
    client = state.ready_client()
    state.check_model(body.model)
    check_ids(body.tokens, client.num_token_ids, "tokens")
    text = await in_worker(lambda: client.vocabulary.decode(body.tokens))
    return Response(DetokenizeResponse(prompt=text).model_dump_json(), media_type="application/json")


def _tokenized(body: TokenizeRequest, client: EngineClient) -> Response:
    ids = body.read(client, Reader(client)).token_ids
    check_ids(ids, client.num_token_ids, "prompt")
    names = [client.tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None
    answer = TokenizeResponse(
        count=len(ids), max_model_len=client.max_model_len, tokens=ids, token_strs=names
    )
    return Response(answer.model_dump_json(), media_type="application/json")
