"""Explanations: one prefill, and what each policy would keep of it."""

from __future__ import annotations

import base64
import time
import uuid
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.requests import Request as HTTPRequest

from curkv.cache.explain import Explanation
from curkv.cache.options import EvictionOptions
from curkv.cache.plan import EvictionPlan
from curkv.engine.types import InvalidRequest, Planned, Request, SamplingParams
from curkv.server.explain.protocol import ExplainRequest, ExplainResponse, PolicyExplanation, Span
from curkv.server.headers import EvictionControls, eviction_controls
from curkv.server.limits import read_limits
from curkv.server.protocol import Usage
from curkv.server.queue import Place
from curkv.server.state import ServerState
from curkv.server.streaming import OutputStream
from curkv.server.tokenizing import Reader
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

_DECIMALS = 4


@dataclass(frozen=True)
class Question:
    """A prompt whose policies can be asked.

    Attributes:
        planned: the engine's request.
        place: what it takes of the queue.
        timeout: seconds that it may take; None: as long as it likes.
    """

    planned: Planned
    place: Place
    timeout: float | None


async def prepare(body: ExplainRequest, http: HTTPRequest, state: ServerState) -> Question:
    """Takes a place in the queue and checks the prompt and every policy.

    Raises:
        APIError: another model was asked for, the server takes no requests, or the queue is full.
        InvalidRequest: a field or header has a bad value, or the engine could not serve it.
    """
    client = state.ready_client()
    state.check_model(body.model)
    limits = read_limits(http.headers, body.priority, state.settings)
    place = state.queue.enter(1, state.key_of(http))
    try:
        planned = await in_worker(lambda: _plan(body, http.headers, limits.priority, client, place, state))
    except BaseException:
        place.leave()
        raise
    return Question(planned, place, limits.timeout)


def _plan(
    body: ExplainRequest,
    headers: Headers,
    priority: int,
    client: EngineClient,
    place: Place,
    state: ServerState,
) -> Planned:
    prompt = body.read(client, Reader(client, place))
    request = Request(
        id=f"explain-{uuid.uuid4().hex}",
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(max_tokens=0),
        eviction=EvictionOptions(),
        cache_salt=state.keys.salt(place.key, ""),
        priority=priority,
        owner=place.key,
        tenant=state.keys.tenant(place.key),
        frame_tokens=prompt.frame_tokens,
    )
    options, plans = [], []
    for index, fields in enumerate(body.policies or [body.kv]):
        name = f"policies.{index}" if body.policies else "kv"
        try:
            controls = eviction_controls(headers, fields, state.eviction)
            plans.append(_resolved(controls, client, request))
            options.append(controls.options)
        except InvalidRequest as error:
            param = (error.param or "").replace("kv", name, 1) or None
            raise error.of(param) from error
    planned = client.plan(request)
    asked = replace(planned.request, explain=tuple(options))
    return replace(planned, request=asked, explain_plans=tuple(plans))


def _resolved(controls: EvictionControls, client: EngineClient, request: Request) -> EvictionPlan:
    """The options' plan, if what it does to the prompt can be said after the whole of it is computed."""
    options = controls.options
    if controls.session:
        raise controls.named(InvalidRequest("an explanation belongs to no session", "kv.session"))
    for field, reason in (
        ("context_tokens", "an explanation is of the whole prompt: send the context alone"),
        ("prefill", "an explanation is of one eviction after the whole prompt, not of one per chunk"),
    ):
        if getattr(options, field) != getattr(EvictionOptions(), field):
            raise controls.named(InvalidRequest(reason, f"kv.{field}"))
    try:
        return client.plan(replace(request, eviction=options)).eviction
    except InvalidRequest as error:
        raise controls.named(error) from error


async def explain(body: ExplainRequest, question: Question, state: ServerState) -> bytes:
    """Computes the prompt and words what the policies say of it, as JSON."""
    client, planned = state.ready_client(), question.planned
    with closing(OutputStream(client, [planned], [question.place], question.timeout)) as outputs:
        _, output = [item async for item in outputs][-1]
    ids, layout = planned.request.prompt_token_ids, client.cache_layout

    def answer() -> bytes:
        worded = ExplainResponse(
            id=planned.request.id,
            created=int(time.time()),
            model=state.settings.model_name,
            num_layers=len(layout.evicted_rows),
            layers=[layout.cached_layers[row] for row in layout.evicted_rows],
            num_kv_heads=layout.num_kv_heads,
            token_ids=ids,
            tokens=[client.vocabulary.text_of(i) for i in ids],
            policies=[_worded(found, bool(body.scores)) for found in output.explanations],
            usage=Usage(prompt_tokens=len(ids), completion_tokens=0, total_tokens=len(ids)),
        )
        return worded.model_dump_json().encode()

    return await in_worker(answer)


def _worded(found: Explanation, scores: bool) -> PolicyExplanation:
    return PolicyExplanation(
        policy=found.policy,
        budget_tokens=found.budget_tokens,
        kept_ratio=round(float(found.kept.mean()), 6),
        kept=[[_spans(head) for head in layer] for layer in found.kept],
        mean=np.round(found.kept.mean((0, 1)), _DECIMALS).tolist(),
        scores=base64.b64encode(found.ranks.tobytes()).decode() if scores else None,
        bytes_full=found.bytes_full,
        bytes_kept=found.bytes_kept,
        error=round(float(found.errors.mean()), 6),
        head_errors=np.round(found.errors.astype(np.float64), _DECIMALS).tolist(),
    )


def _spans(kept: NDArray[np.bool_]) -> list[Span]:
    """Spans [start, end) of the true entries of bool [n]."""
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    return [(start, end) for start, end in edges.reshape(-1, 2).tolist()]
