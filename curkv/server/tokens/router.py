"""Routes of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from curkv.engine.types import InvalidRequest
from curkv.server.errors import error_responses
from curkv.server.state import server_state
from curkv.server.tokens.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

router = APIRouter(tags=["tokens"], responses=error_responses(400, 404, 408, 413, 503))


@router.post("/tokenize", summary="Turn a prompt into tokens")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """Gives the tokens that a text or a conversation has for the model."""
    state = server_state(request)
    client = state.ready_client()
    state.check_model(body.model)
    ids = await run_in_threadpool(body.token_ids, client, body.add_special_tokens)
    names = None
    if body.return_token_strs:
        names = await run_in_threadpool(lambda: [client.tokenizer.id_to_token(i) for i in ids])
    return TokenizeResponse(count=len(ids), max_model_len=client.max_model_len, tokens=ids, token_strs=names)


@router.post("/detokenize", summary="Turn tokens into text")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """Gives the text of tokens."""
    state = server_state(request)
    client = state.ready_client()
    state.check_model(body.model)
    vocab = client.vocab_size
    if (bad := next((i for i in body.tokens if not 0 <= i < vocab), None)) is not None:
        raise InvalidRequest(f"token id {bad} is outside the vocabulary 0..{vocab - 1}", "tokens")
    text = await run_in_threadpool(client.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
