"""From a request of any generating endpoint to the engine and back; only the wording is the endpoint's."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from curkv.cache.plan import EvictionPlan
from curkv.engine.types import InvalidRequest, KVReport, Output, Request, SamplingParams
from curkv.server import headers, limits
from curkv.server.errors import as_api_error, error_responses
from curkv.server.headers import OPENAPI_RESPONSE_HEADERS, eviction_controls
from curkv.server.limits import read_limits
from curkv.server.protocol import GenerationFields, KVUsage, PromptTokensDetails, Usage
from curkv.server.state import ServerState
from curkv.server.streaming import (
    DONE,
    ClientDisconnected,
    EventStream,
    OutputStream,
    event,
    unless_disconnected,
)

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499

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
    """

    token_ids: list[int]
    text: str | None = None
    context_tokens: int | None = None


@dataclass(frozen=True)
class Generation:
    """A request that was found servable: one engine request per prompt.

    Attributes:
        id: id of the answer.
        created: Unix time in seconds.
        body: what was asked.
        model: name of the model served.
        client: the engine.
        prompts: in the order of the body.
        requests: one per prompt.
        plans: each request's eviction, resolved.
        timeout: seconds that it may take; None: as long as it likes.
    """

    id: str
    created: int
    body: GenerationFields
    model: str
    client: EngineClient
    prompts: list[Prompt]
    requests: list[Request]
    plans: list[EvictionPlan]
    timeout: float | None

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return len(self.requests) * self.body.choices_per_prompt

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that say what eviction will do; a mean if prompts differ."""
        budget = round(fmean(plan.kept_prompt_tokens for plan in self.plans))
        return {"X-KV-Policy": self.requests[0].eviction.policy, "X-KV-Budget-Tokens": str(budget)}

    def start(self) -> OutputStream:
        """Hands all prompts to the engine."""
        return OutputStream(self.client, self.requests, self.timeout)

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[choice // self.body.choices_per_prompt]

    def token_text(self, token_id: int) -> str:
        """A token's own text: bytes of a character that is split over tokens show as U+FFFD."""
        text: str = self.client.tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class Answer(ABC):
    """How an endpoint words what the engine says; it counts tokens and keeps eviction reports besides.

    Args:
        generation: what the engine was asked.
    """

    def __init__(self, generation: Generation):
        self.generation = generation
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._reports: list[KVReport] = []

    @abstractmethod
    def chunk(self, choice: int, output: Output) -> BaseModel | None:
        """What a stream says of an output; None if there is no news in it."""

    @abstractmethod
    def add(self, choice: int, output: Output) -> None:
        """Takes an output into the whole answer."""

    @abstractmethod
    def whole(self, usage: Usage) -> BaseModel:
        """The answer, once all outputs are in it."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> BaseModel:
        """Last chunk of a stream that was asked for its usage."""

    @property
    def usage(self) -> Usage:
        """Tokens of all prompts and choices so far."""
        prompt = sum(len(request.prompt_token_ids) for request in self.generation.requests)
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


def documented(response: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a generating route that describe it in the OpenAPI document."""
    return {
        "response_model": response,
        "responses": {
            200: {
                "description": "The answer; with `stream: true`, chunks of it ending in `data: [DONE]`.",
                "content": {"text/event-stream": {"schema": _EVENT}},
                "headers": OPENAPI_RESPONSE_HEADERS,
            },
            **error_responses(400, 404, 408, 413, 429, 500, 503),
        },
        "openapi_extra": {"parameters": [*headers.OPENAPI_PARAMETERS, *limits.OPENAPI_PARAMETERS]},
    }


async def prepare(
    body: GenerationFields,
    sampling: SamplingParams,
    tokenize: Callable[[EngineClient], list[Prompt]],
    http: HTTPRequest,
    state: ServerState,
    prefix: str,
) -> Generation:
    """Checks everything that can be checked before the engine takes anything.

    Args:
        body: the request's body.
        sampling: what of it is the engine's.
        tokenize: makes the prompts; may be slow and raise `InvalidRequest`.
        http: for its headers.
        state: the server's.
        prefix: of the answer's id.

    Raises:
        APIError: another model was asked for, or the server takes no requests.
        InvalidRequest: a field or header has a bad value.
    """
    client = state.admitting_client()
    state.check_model(body.model)
    treated = read_limits(http.headers, body.priority, state.settings)
    if body.unknown_fields:
        logger.warning("ignored unknown fields of a request: %.500r", body.unknown_fields)
    controls = eviction_controls(http.headers, body.kv, state.eviction)
    prompts = await run_in_threadpool(tokenize, client)
    answer_id = f"{prefix}-{uuid.uuid4().hex}"
    requests = [
        Request(
            id=f"{answer_id}-{index}",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            eviction=controls.for_context(prompt.context_tokens),
            cache_salt=body.cache_salt or "",
            priority=treated.priority,
        )
        for index, prompt in enumerate(prompts)
    ]
    try:
        plans = await run_in_threadpool(lambda: [client.plan(request) for request in requests])
    except InvalidRequest as error:
        raise controls.named(error) from error
    created, model = int(time.time()), state.settings.model_name
    return Generation(answer_id, created, body, model, client, prompts, requests, plans, treated.timeout)


async def respond(answer: Answer, http: HTTPRequest) -> Response:
    """Runs a generation and answers it as its body asks, as JSON or as server-sent events."""
    generation = answer.generation
    try:
        if generation.body.stream:
            return await _stream(answer, http)
        whole = await unless_disconnected(http, _collect(answer))
    except ClientDisconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(whole.model_dump(mode="json"), headers=generation.headers)


async def _collect(answer: Answer) -> BaseModel:
    with closing(answer.generation.start()) as outputs:
        async for choice, output in answer.outputs(outputs):
            answer.add(choice, output)
    return answer.whole(answer.usage)


async def _stream(answer: Answer, http: HTTPRequest) -> Response:
    """Starts the stream with its first token, so that what fails before it gets an error status."""
    outputs = answer.generation.start()
    try:
        await unless_disconnected(http, outputs.wait_for_first())
    except BaseException:
        outputs.close()
        raise
    return EventStream(_events(answer, outputs), outputs, answer.generation.headers)


async def _events(answer: Answer, outputs: OutputStream) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; a failure is one event more, and the stream ends as usual."""
    include_usage = answer.generation.body.include_usage
    hidden = None if include_usage else {"usage"}
    try:
        async for choice, output in answer.outputs(outputs):
            if (chunk := answer.chunk(choice, output)) is not None:
                yield event(chunk, exclude=hidden)
        if include_usage:
            yield event(answer.usage_chunk(answer.usage))
    except Exception as error:
        logger.exception("%s failed in mid-stream", answer.generation.id)
        yield event(as_api_error(error).body)
    yield DONE
