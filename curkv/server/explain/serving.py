"""Explanations: one prefill, and what each policy would keep of it."""

from __future__ import annotations

import base64
import time
import uuid
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from curkv.cache.explain import Explanation
from curkv.cache.options import EvictionOptions
from curkv.engine.types import InvalidRequest, Request, SamplingParams
from curkv.server.explain.protocol import ExplainRequest, ExplainResponse, PolicyExplanation, Span
from curkv.server.headers import EvictionControls, eviction_controls
from curkv.server.limits import Limits, read_limits
from curkv.server.protocol import Usage
from curkv.server.state import ServerState
from curkv.server.streaming import OutputStream

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

_DECIMALS = 4


async def prepare(body: ExplainRequest, headers: Headers, state: ServerState) -> tuple[Request, Limits]:
    """Checks the prompt and every policy; takes nothing.

    Raises:
        APIError: another model was asked for, or the server takes no requests.
        InvalidRequest: a field or header has a bad value, or the engine could not serve it.
    """
    client = state.admitting_client()
    state.check_model(body.model)
    limits = read_limits(headers, body.priority, state.settings)
    ids = await run_in_threadpool(body.token_ids, client)
    request = Request(
        id=f"explain-{uuid.uuid4().hex}",
        prompt_token_ids=ids,
        sampling=SamplingParams(max_tokens=0),
        eviction=EvictionOptions(),
        priority=limits.priority,
    )
    options = []
    for index, fields in enumerate(body.policies or [body.kv]):
        place = f"policies.{index}" if body.policies else "kv"
        try:
            controls = eviction_controls(headers, fields, state.eviction)
            options.append(_explainable(controls, client, request))
        except InvalidRequest as error:
            param = (error.param or "").replace("kv", place, 1) or None
            raise InvalidRequest(error.message, param) from error
    request = replace(request, explain=tuple(options))
    await run_in_threadpool(client.plan, request)
    return request, limits


def _explainable(controls: EvictionControls, client: EngineClient, request: Request) -> EvictionOptions:
    """The options, if what they do to the request's prompt can be said after the whole of it is computed."""
    options = controls.options
    for field, reason in (
        ("context_tokens", "an explanation is of the whole prompt: send the context alone"),
        ("prefill", "an explanation is of one eviction after the whole prompt, not of one per chunk"),
    ):
        if getattr(options, field) != getattr(EvictionOptions(), field):
            raise controls.named(InvalidRequest(reason, f"kv.{field}"))
    try:
        client.plan(replace(request, eviction=options))
    except InvalidRequest as error:
        raise controls.named(error) from error
    return options


async def explain(
    body: ExplainRequest, request: Request, limits: Limits, state: ServerState
) -> ExplainResponse:
    """Computes the prompt and words what the policies say of it."""
    client = state.ready_client()
    with closing(OutputStream(client, [request], limits.timeout)) as outputs:
        _, output = [item async for item in outputs][-1]
    ids, layout = request.prompt_token_ids, client.cache_layout
    return ExplainResponse(
        id=request.id,
        created=int(time.time()),
        model=state.settings.model_name,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        token_ids=ids,
        tokens=[client.tokenizer.decode([i], skip_special_tokens=False) for i in ids],
        policies=await run_in_threadpool(
            lambda: [_worded(found, bool(body.scores)) for found in output.explanations]
        ),
        usage=Usage(prompt_tokens=len(ids), completion_tokens=0, total_tokens=len(ids)),
    )


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
