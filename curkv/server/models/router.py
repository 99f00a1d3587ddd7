"""Route of GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter, Request

from curkv.server.errors import error_responses
from curkv.server.models.protocol import ModelCard, ModelList
from curkv.server.state import server_state

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List models", responses=error_responses(503))
async def list_models(request: Request) -> ModelList:
    """Names the model that is served."""
    state = server_state(request)
    card = ModelCard(
        id=state.settings.model_name,
        created=state.created,
        root=state.settings.model,
        max_model_len=state.ready_client().max_model_len,
    )
    return ModelList(data=[card])
