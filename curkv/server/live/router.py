"""Routes of GET /v1/kv/state, GET /v1/kv/policies and DELETE /v1/kv/prefixes."""

from __future__ import annotations

from fastapi import APIRouter, Request

from curkv.cache.policies import policy_descriptions
from curkv.engine.stats import StepStats
from curkv.server.errors import error_responses
from curkv.server.live.protocol import DroppedPrefixes, PolicyCard, PolicyList, State
from curkv.server.state import server_state

router = APIRouter(tags=["cache"])


@router.get(
    "/v1/kv/state",
    summary="What runs and what it holds",
    response_model_exclude={"sequences": {"__all__": {"owner"}}},
)
async def state(request: Request) -> State:
    """Shows the page pool, the queue and every running sequence as they were after the engine's last step.

    With several API keys, sequences are those of the request's own key.
    """
    server = server_state(request)
    key = server.key_of(request)
    stats = server.client.stats if server.client is not None else StepStats(0, 0, 0, 0, 0, 0)
    return State(
        phase=server.phase,
        model=server.settings.model_name,
        running=stats.running,
        waiting=stats.waiting,
        used_bytes=stats.used_bytes,
        capacity_bytes=stats.capacity_bytes,
        stranded_slots_ratio=stats.stranded_slots_ratio,
        windows=list(server.client.cache_layout.windows) if server.client is not None else [],
        sequences=[s for s in stats.sequences if not server.keys.several or s.owner == key],
    )


@router.delete("/v1/kv/prefixes", summary="Drop held prefixes", responses=error_responses(503))
async def drop_prefixes(request: Request) -> DroppedPrefixes:
    """Drops what is held for repeated prompts, but for what running sequences use.

    With several API keys it is what the request's own key has left; what its running sequences use is found
    no more.
    """
    server = server_state(request)
    client = server.ready_client()
    if server.keys.several:
        server.keys.drop(key := server.key_of(request))
        return DroppedPrefixes(freed_bytes=await client.drop_prefixes(server.keys.tenant(key)))
    return DroppedPrefixes(freed_bytes=await client.drop_prefixes())


@router.get("/v1/kv/policies", summary="List eviction policies")
async def list_policies() -> PolicyList:
    """Names the policies that a request can choose."""
    return PolicyList(
        data=[PolicyCard(name=name, description=text) for name, text in policy_descriptions().items()]
    )
