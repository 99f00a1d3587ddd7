"""Routes of GET /v1/models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

import curkv
from curkv.server.errors import error_responses
from curkv.server.models.protocol import ModelCard, ModelList, Props, PruningCard
from curkv.server.state import ServerState, server_state

router = APIRouter(tags=["models"])


@router.get("/v1/models/{model_id:path}", summary="A model", responses=error_responses(404, 503))
async def get_model(model_id: str, request: Request) -> ModelCard:
    """Describes the model that is served."""
    state = server_state(request)
    return _card(state, state.check_model(model_id))


@router.get("/v1/models", summary="List models", responses=error_responses(503))
async def list_models(request: Request) -> ModelList:
    """Describes the model that is served, under each of its names."""
    state = server_state(request)
    return ModelList(data=[_card(state, name) for name in state.settings.model_names])


@router.get("/props", summary="llama.cpp: the model", responses=error_responses(503))
async def props(request: Request) -> Props:
    """Describes the model as llama.cpp does."""
    state = server_state(request)
    client = state.ready_client()
    template = client.chat_template
    special = template.special_tokens if template is not None else {}
    return Props(
        default_generation_settings={"n_ctx": client.max_model_len},
        total_slots=client.cache_layout.max_sequences,
        model_path=state.settings.engine.model,
        chat_template=template.source if template is not None else "",
        bos_token=special.get("bos_token", ""),
        eos_token=special.get("eos_token", ""),
        build_info=f"curkv {curkv.__version__}",
    )


def _card(state: ServerState, name: str) -> ModelCard:
    client = state.ready_client()
    return ModelCard(
        id=name,
        created=state.created,
        root=state.settings.engine.model,
        max_model_len=client.max_model_len,
        max_kv_tokens=client.max_kv_tokens,
        weights=client.weights,
        weights_bytes=sum(client.weights_bytes.values()),
        kv_dtype=client.cache_layout.format.name,
        pruning=_pruning(client.pruning),
    )


def _pruning(provenance: Mapping[str, Any] | None) -> PruningCard | None:
    if provenance is None:
        return None
    base = provenance["base"]["name"]
    return PruningCard(method=provenance["method"], removed=provenance["removed"], base=base)
