"""From a completion request to the engine and back."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal, cast

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from curkv.cache.options import EvictionPlan
from curkv.engine.types import InvalidRequest, KVReport, Output, Request, TokenLogprob
from curkv.server.completions.protocol import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Logprobs,
)
from curkv.server.errors import as_api_error
from curkv.server.headers import eviction_controls
from curkv.server.protocol import KVUsage, Usage
from curkv.server.state import ServerState
from curkv.server.streaming import DONE, OutputStream, event

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """A request that was found servable: one engine request per prompt.

    Attributes:
        id: id of the completion.
        created: Unix time in seconds.
        body: what was asked.
        model: name of the model served.
        client: the engine.
        requests: in the order of the prompts.
        plans: each request's eviction, resolved.
    """

    id: str
    created: int
    body: CompletionRequest
    model: str
    client: EngineClient
    requests: list[Request]
    plans: list[EvictionPlan]

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that say what eviction will do; a mean if prompts differ."""
        budget = round(fmean(plan.kept_prompt_tokens for plan in self.plans))
        return {"X-KV-Policy": self.requests[0].eviction.policy, "X-KV-Budget-Tokens": str(budget)}

    def start(self) -> OutputStream:
        """Hands all prompts to the engine."""
        return OutputStream(self.client, self.requests)

    def choice_index(self, prompt: int, output: Output) -> int:
        """Choice i of prompt p has index p * n + i."""
        return prompt * self.body.choices_per_prompt + output.index

    def drafts(self) -> list[Draft]:
        """One empty draft per choice."""
        count = len(self.requests) * self.body.choices_per_prompt
        return [Draft(self, index) for index in range(count)]

    def response(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionResponse:
        """An answer or a chunk of one."""
        return CompletionResponse(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def usage(self, drafts: Sequence[Draft]) -> Usage:
        """Tokens of all prompts and choices."""
        prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        completion = sum(draft.num_tokens for draft in drafts)
        reports = [draft.kv for draft in drafts if draft.kv is not None]
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            kv=KVUsage.combine(reports),
        )


@dataclass
class Draft:
    """What is known of one choice so far."""

    completion: Completion
    index: int
    begun: bool = False
    num_tokens: int = 0
    num_characters: int = 0
    kv: KVReport | None = None

    def add(self, output: Output) -> CompletionChoice:
        """Takes in what the engine reports and returns what is new in the API's form."""
        body = self.completion.body
        prompt = self.completion.requests[self.index // body.choices_per_prompt].prompt_token_ids
        piece = CompletionChoice(
            index=self.index,
            text=output.text,
            logprobs=self._logprobs(output.logprobs or ()) if body.logprobs is not None else None,
            finish_reason=cast("Literal['stop', 'length'] | None", output.finish_reason),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if body.return_token_ids else None,
            prompt_token_ids=prompt if body.return_token_ids and not self.begun else None,
        )
        self.begun = True
        self.num_tokens += len(output.token_ids)
        self.kv = output.kv or self.kv
        return piece

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Logprobs:
        """Token texts are each token's own: bytes of a character split over tokens show as U+FFFD."""
        answer = Logprobs(top_logprobs=[] if self.completion.body.logprobs else None)
        for entry in entries:
            token = self._decode(entry.token_id)
            answer.tokens.append(token)
            answer.token_logprobs.append(entry.logprob)
            answer.text_offset.append(self.num_characters)
            self.num_characters += len(token)
            if answer.top_logprobs is not None:
                answer.top_logprobs.append({self._decode(i): logprob for i, logprob in reversed(entry.top)})
        return answer

    def _decode(self, token_id: int) -> str:
        text: str = self.completion.client.tokenizer.decode([token_id], skip_special_tokens=False)
        return text


async def prepare(body: CompletionRequest, headers: Headers, state: ServerState) -> Completion:
    """Checks everything that can be checked before the engine takes anything.

    Raises:
        APIError: another model was asked for, or the server takes no requests.
        InvalidRequest: a field or header has a bad value.
    """
    client = state.ready_client()
    state.check_model(body.model)
    if body.unknown_fields:
        logger.warning("ignored unknown fields of a completion request: %.500r", body.unknown_fields)
    controls = eviction_controls(headers, body.kv, state.eviction)
    prompts = await run_in_threadpool(_tokenize, client, body.prompts)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    requests = [
        Request(
            id=f"{completion_id}-{index}",
            prompt_token_ids=prompt,
            sampling=body.sampling(body.max_tokens, body.logprobs),
            eviction=controls.options,
            priority=body.priority,
        )
        for index, prompt in enumerate(prompts)
    ]
    try:
        plans = [client.plan(request) for request in requests]
    except InvalidRequest as error:
        raise controls.named(error) from error
    return Completion(
        completion_id, int(time.time()), body, state.settings.model_name, client, requests, plans
    )


def _tokenize(client: EngineClient, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    return [client.tokenizer.encode(p).ids if isinstance(p, str) else p for p in prompts]


async def complete(completion: Completion) -> CompletionResponse:
    """The whole answer at once."""
    drafts = completion.drafts()
    choices = [CompletionChoice(index=draft.index, text="") for draft in drafts]
    with closing(completion.start()) as outputs:
        async for prompt, output in outputs:
            index = completion.choice_index(prompt, output)
            choices[index].extend(drafts[index].add(output))
    return completion.response(choices, completion.usage(drafts))


async def events(completion: Completion, outputs: OutputStream) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; a failure is one event more, and the stream ends as usual."""
    drafts = completion.drafts()
    hidden = None if completion.body.include_usage else {"usage"}
    try:
        async for prompt, output in outputs:
            piece = drafts[completion.choice_index(prompt, output)].add(output)
            if piece.has_news:
                yield event(completion.response([piece]), exclude=hidden)
        if completion.body.include_usage:
            yield event(completion.response([], completion.usage(drafts)))
    except Exception as error:
        logger.exception("%s failed in mid-stream", completion.id)
        yield event(as_api_error(error).body)
    yield DONE
