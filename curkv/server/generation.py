"""From a request of any generating endpoint to the engine and back; only the wording is the endpoint's."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from curkv.engine.types import InvalidRequest, KVReport, Output, Planned, Request, SamplingParams
from curkv.server import headers, limits
from curkv.server.errors import (
    APIError,
    ClientDisconnected,
    ErrorResponse,
    as_api_error,
    error_responses,
)
from curkv.server.headers import OPENAPI_RESPONSE_HEADERS, eviction_controls
from curkv.server.limits import MAX_ALL_CHOICES, read_limits
from curkv.server.protocol import Chunk, GenerationFields, KVUsage, PromptTokensDetails, Usage
from curkv.server.queue import Place
from curkv.server.state import ServerState
from curkv.server.streaming import (
    DONE,
    EVENT_STREAM,
    OutputStream,
    PieceStream,
    event,
    unless_disconnected,
)
from curkv.server.tokenizing import Reader
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

logger = logging.getLogger(__name__)

_EVENT = {
    "type": "object",
    "description": "One server-sent event.",
    "properties": {
        "data": {"type": "string", "description": "A chunk or an error as JSON; at the end [DONE]."}
    },
    "required": ["data"],
}


@dataclass(frozen=True)
class Prompt:
    """What the engine is to continue.

    Attributes:
        token_ids: its tokens.
        text: as it was given; None if it was given in tokens.
        context_tokens: where the client says that its context ends, in tokens; None if it says nothing.
        context_ttl: seconds for which what is cached of it gives way after all else.
        frame_tokens: first tokens that are the chat template's and nothing that the client says.
    """

    token_ids: list[int]
    text: str | None = None
    context_tokens: int | None = None
    context_ttl: float = 0.0
    frame_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """A request that was found servable: one engine request per prompt.

    Attributes:
        id: id of the answer.
        created: Unix time in seconds.
        body: what was asked.
        model: name under which the model is served.
        client: the engine.
        prompts: in the order of the body.
        requests: one per prompt.
        places: what each takes of the queue.
        timeout: seconds that it may take; None: as long as it likes.
    """

    id: str
    created: int
    body: GenerationFields
    model: str
    client: EngineClient
    prompts: list[Prompt]
    requests: list[Planned]
    places: list[Place]
    timeout: float | None

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return len(self.requests) * self.body.choices_per_prompt

    @property
    def headers(self) -> dict[str, str]:
        """Response headers: what eviction will do, a mean if prompts differ, and what is not followed."""
        budget = round(fmean(planned.eviction.kept_prompt_tokens for planned in self.requests))
        policy = self.requests[0].eviction.policy.name
        structure = self.requests[0].request.sampling.structure
        ignored = structure.ignored if structure is not None else ()
        told = {"X-Structure-Ignored": ", ".join(ignored)} if ignored else {}
        return {"X-KV-Policy": policy, "X-KV-Budget-Tokens": str(budget), **told}

    def start(self) -> OutputStream:
        """Hands all prompts to the engine."""
        return OutputStream(self.client, self.requests, self.places, self.timeout)

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[choice // self.body.choices_per_prompt]


class Answer(ABC):
    """How an endpoint words what the engine says; it counts tokens and keeps eviction reports besides.

    Args:
        generation: what the engine was asked.

    Attributes:
        media_type: of its streams.
    """

    media_type: ClassVar[str] = EVENT_STREAM

    def __init__(self, generation: Generation):
        self.generation = generation
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._reports: list[KVReport] = []

    @abstractmethod
    def streamed(self, choice: int, output: Output) -> str:
        """What a stream says of an output; nothing if there is no news in it."""

    @abstractmethod
    def ending(self) -> str:
        """The end of a stream, once all outputs are in it."""

    @abstractmethod
    def failing(self, error: APIError) -> str:
        """The end of a stream that failed on its way."""

    @abstractmethod
    def add(self, choice: int, output: Output) -> None:
        """Takes an output into the whole answer."""

    @abstractmethod
    def whole(self) -> BaseModel:
        """The answer, once all outputs are in it."""

    @property
    def usage(self) -> Usage:
        """Tokens of all prompts and choices so far."""
        prompt = sum(len(prompt.token_ids) for prompt in self.generation.prompts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
            kv=KVUsage.combine(self._reports),
        )

    async def outputs(self, stream: OutputStream) -> AsyncGenerator[tuple[int, Output], None]:
        """Counts the engine's outputs and yields each with its choice: choice i of prompt p is p * n + i."""
        async for prompt, output in stream:
            self._completion_tokens += len(output.token_ids)
            if output.finish_reason is not None and output.index == 0:
                self._cached_tokens += output.cached_tokens
            if output.kv is not None:
                self._reports.append(output.kv)
            yield prompt * self.generation.body.choices_per_prompt + output.index, output


class ChunkedAnswer(Answer):
    """An answer whose stream is chunks as in OpenAI's older endpoints, ending in `data: [DONE]`."""

    @abstractmethod
    def chunk(self, choice: int, output: Output) -> Chunk | None:
        """What a stream says of an output; None if there is no news in it."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> Chunk:
        """A chunk that says nothing but the usage."""

    def streamed(self, choice: int, output: Output) -> str:
        """See `Answer`."""
        chunk = self.chunk(choice, output)
        if chunk is None:
            return ""
        if not self.generation.body.include_usage:
            return event(chunk, exclude={"usage"})
        if self.generation.body.usage_in_every_chunk:
            chunk.usage = self.usage
        return event(chunk)

    def ending(self) -> str:
        """See `Answer`."""
        last = event(self.usage_chunk(self.usage)) if self.generation.body.include_usage else ""
        return last + DONE

    def failing(self, error: APIError) -> str:
        """See `Answer`."""
        return event(error.body) + DONE


def documented(
    response: type[BaseModel], media_type: str = EVENT_STREAM, errors: type[BaseModel] = ErrorResponse
) -> dict[str, Any]:
    """Arguments of a generating route that describe it in the OpenAPI document.

    Args:
        response: the whole answer.
        media_type: of its streams.
        errors: shape of its errors.
    """
    return {
        "response_model": response,
        "responses": {
            200: {
                "description": "The answer; with `stream: true`, pieces of it.",
                "content": {media_type: {"schema": _EVENT}},
                "headers": OPENAPI_RESPONSE_HEADERS,
            },
            **error_responses(400, 404, 408, 413, 429, 500, 503, shape=errors),
        },
        "openapi_extra": {"parameters": [*headers.OPENAPI_PARAMETERS, *limits.OPENAPI_PARAMETERS]},
    }


async def prepare(
    body: GenerationFields,
    sampling: Callable[[EngineClient], SamplingParams],
    num_prompts: int,
    tokenize: Callable[[EngineClient, Reader], list[Prompt]],
    http: HTTPRequest,
    state: ServerState,
    prefix: str,
) -> Generation:
    """Takes places in the queue and checks everything that can be checked before the engine takes anything.

    Args:
        body: the request's body.
        sampling: tells what of it is the engine's; may be slow and raise `InvalidRequest`.
        num_prompts: how many prompts `tokenize` makes.
        tokenize: makes the prompts; may be slow and raise `InvalidRequest`.
        http: for its headers.
        state: the server's.
        prefix: of the answer's id.

    Raises:
        APIError: another model was asked for, the server takes no requests, or the queue is full.
        InvalidRequest: a field or header has a bad value.
    """
    client = state.ready_client()
    model = state.check_model(body.model)
    treated = read_limits(http.headers, body.priority, state.settings)
    try:
        body.check_others()
    except InvalidRequest as error:
        logger.warning("a field that is not done was asked for: %.100s", error.param)
        raise
    controls = eviction_controls(http.headers, body.kv, state.eviction)
    choices = num_prompts * body.choices_per_prompt
    if choices > MAX_ALL_CHOICES:
        raise InvalidRequest(f"{choices} choices in one request, at most {MAX_ALL_CHOICES} are allowed", "n")
    answer_id, created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
    key = state.key_of(http)
    place = state.queue.enter(choices, key)
    try:
        params = await in_worker(lambda: sampling(client))
        keep = body.truncate_prompt_tokens
        if keep == -1:
            keep = max(1, client.max_model_len - max(1, params.max_tokens or 1))
        reader = Reader(client, place, keep)
        prompts = await in_worker(lambda: tokenize(client, reader))
        if params.structure is not None:
            await state.vetting.compile(params.structure, client.structures)
        requests = [
            Request(
                id=f"{answer_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=params,
                eviction=controls.for_context(prompt.context_tokens),
                cache_salt=state.keys.salt(key, body.cache_salt or ""),
                priority=treated.priority,
                owner=key,
                traceparent=http.headers.get("traceparent", ""),
                tenant=state.keys.tenant(key),
                context_ttl=prompt.context_ttl,
                frame_tokens=prompt.frame_tokens,
                session=controls.session,
            )
            for index, prompt in enumerate(prompts)
        ]
        planned = await in_worker(lambda: [client.plan(request) for request in requests])
    except InvalidRequest as error:
        place.leave()
        raise controls.named(error) from error
    except BaseException:
        place.leave()
        raise
    places = place.split([(body.choices_per_prompt, len(prompt.token_ids)) for prompt in prompts])
    return Generation(answer_id, created, body, model, client, prompts, planned, places, treated.timeout)


async def respond(answer: Answer, http: HTTPRequest) -> Response:
    """Runs a generation and answers it as its body asks, as JSON or as a stream.

    Raises:
        ClientDisconnected: the client went away.
    """
    generation = answer.generation
    try:
        if generation.body.stream:
            return await _stream(answer, http)
        whole = await unless_disconnected(http, _collect(answer))
    except ClientDisconnected:
        for place in generation.places:  # they have not been handed on, if nothing was begun
            place.leave()
        raise
    return Response(whole, media_type="application/json", headers=generation.headers)


async def _collect(answer: Answer) -> bytes:
    with closing(answer.generation.start()) as outputs:
        async for choice, output in answer.outputs(outputs):
            if output.prompt_logprobs is None:
                answer.add(choice, output)
            else:
                await in_worker(partial(answer.add, choice, output))
    return await in_worker(lambda: answer.whole().model_dump_json().encode())


async def _stream(answer: Answer, http: HTTPRequest) -> Response:
    """Starts the stream with its first token, so that what fails before it gets an error status."""
    outputs = answer.generation.start()
    try:
        await unless_disconnected(http, outputs.wait_for_first())
    except BaseException:
        outputs.close()
        raise
    return PieceStream(_pieces(answer, outputs), outputs, answer.media_type, answer.generation.headers)


async def _pieces(answer: Answer, outputs: OutputStream) -> AsyncGenerator[str, None]:
    """The answer piece by piece; a failure is one piece more."""
    try:
        async for choice, output in answer.outputs(outputs):
            if output.prompt_logprobs is None:
                piece = answer.streamed(choice, output)
            else:
                piece = await in_worker(partial(answer.streamed, choice, output))
            if piece:
                yield piece
        yield answer.ending()
    except Exception as error:
        problem = as_api_error(error)
        unforeseen = error if problem.unforeseen else None
        logger.error("%s ended in mid-stream: %s", answer.generation.id, error, exc_info=unforeseen)
        yield answer.failing(problem)
