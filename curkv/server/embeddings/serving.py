"""Embeddings: texts in, and the means of their last hidden states."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest

from curkv.cache.options import EvictionOptions
from curkv.engine.types import InvalidRequest, Planned, Request, SamplingParams
from curkv.server import limits
from curkv.server.embeddings.protocol import EmbeddingFields
from curkv.server.errors import error_responses
from curkv.server.limits import read_limits
from curkv.server.queue import Place
from curkv.server.state import ServerState
from curkv.server.streaming import OutputStream, unless_disconnected
from curkv.server.tokenizing import Reader
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


@dataclass(frozen=True)
class Embedded:
    """Texts and their vectors.

    Attributes:
        model: name under which the model is served.
        vectors: float32 [texts, hidden], each of length 1.
        tokens: of all texts together.
    """

    model: str
    vectors: NDArray[np.float32]
    tokens: int


async def embed(
    body: EmbeddingFields,
    prompts: Sequence[str] | Sequence[list[int]],
    keep: int | None,
    http: HTTPRequest,
    state: ServerState,
    param: str = "input",
) -> Embedded:
    """Computes texts, with the whole cache, and pools what the model's head would read of their tokens.

    Args:
        body: the request's body.
        prompts: the texts, or their tokens.
        keep: most last tokens of a text that are read, -1: as many as the context has room for; None: all.
        http: for its headers, and to see whether the client goes away.
        state: the server's.
        param: the field that has the texts.

    Raises:
        APIError: another model was asked for, the server takes no requests, or the queue is full.
        InvalidRequest: a field or header has a bad value, or a text is too long.
        ClientDisconnected: the client went away.
    """
    client, model = state.ready_client(), state.check_model(body.model)
    treated = read_limits(http.headers, body.priority, state.settings)
    body.check_others()
    key = state.key_of(http)
    if (header := next((name for name in http.headers if name.startswith("x-kv-")), None)) is not None:
        raise InvalidRequest("texts are read with the whole cache", header)
    shared = Request(
        id=f"embd-{uuid.uuid4().hex}",
        prompt_token_ids=[],
        sampling=SamplingParams(max_tokens=0, embed=True),
        eviction=EvictionOptions(),
        cache_salt=state.keys.salt(key, ""),
        priority=treated.priority,
        owner=key,
        traceparent=http.headers.get("traceparent", ""),
        tenant=state.keys.tenant(key),
    )
    place = state.queue.enter(len(prompts), key)

    def plan() -> list[Planned]:
        reader = Reader(client, place, client.max_model_len if keep == -1 else keep)
        read = [_tokens(prompt, param, reader) for prompt in prompts]
        named = (replace(shared, id=f"{shared.id}-{i}", prompt_token_ids=ids) for i, ids in enumerate(read))
        return [client.plan(request) for request in named]

    try:
        planned = await in_worker(plan)
    except InvalidRequest as error:
        place.leave()
        raise error.of(param) from error  # there is nothing else that the engine could not do
    except BaseException:
        place.leave()
        raise
    lengths = [len(item.request.prompt_token_ids) for item in planned]
    places = place.split([(1, length) for length in lengths])
    try:
        vectors = await unless_disconnected(http, _run(client, planned, places, treated.timeout))
    finally:
        for each in places:  # they have not been handed on, if nothing was begun
            each.leave()
    return Embedded(model, vectors, sum(lengths))


def _tokens(prompt: str | list[int], param: str, reader: Reader) -> list[int]:
    return reader.tokens(prompt, param) if isinstance(prompt, str) else reader.count(prompt)


async def _run(
    client: EngineClient, planned: list[Planned], places: list[Place], timeout: float | None
) -> NDArray[np.float32]:
    rows: dict[int, list[float]] = {}
    with closing(OutputStream(client, planned, places, timeout)) as outputs:
        async for index, output in outputs:
            rows[index] = output.embedding or []
    vectors = np.array([rows[index] for index in range(len(planned))], dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def documented(errors: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a route that embeds, which describe it in the OpenAPI document.

    Args:
        errors: shape of its errors.
    """
    return {
        "responses": error_responses(400, 404, 408, 413, 429, 500, 503, shape=errors),
        "openapi_extra": {"parameters": limits.OPENAPI_PARAMETERS},
    }
